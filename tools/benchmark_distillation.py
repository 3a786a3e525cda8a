"""Time of a student's training step (forward and backward) beside the baseline's, with and without a cached teacher."""

import argparse

import torch

from configs.schema import Config, load_config
from model.task import RetrievalTask, build_task
from model.teacher import CachedTeacher, Teacher
from tools.steps import compare_steps
from utils.batch import Batch
from utils.distributed import default_device, describe_device

WAYS = ("baseline", "cached teacher", "teacher in every step")
NUM_PAIRS = 1000  # of the cached tables


def build(way: str, config: Config, teacher_config: Config) -> RetrievalTask:
    """A student with random weights; the baseline is the student without what distils."""
    losses = {name: options for name, options in config.losses.items() if way != WAYS[0] or "distill" not in name}
    task = build_task(Config(data=config.data, model=config.model, losses=losses), 10, pretrained=False)
    if way != WAYS[0]:
        teacher = Teacher(build_task(teacher_config, None, pretrained=False).encoder)
        if way == WAYS[1]:
            cached = CachedTeacher(teacher)
            cached.fill(*(torch.randn(NUM_PAIRS, task.encoder.embed_dim) for _ in range(2)))
            task.learn_from(cached)
        else:
            task.learn_from(teacher)
    return task.to(default_device())


def random_batch(config: Config, size: int, vocab_size: int) -> Batch:
    """All fields that any of the tasks reads; every support slot is taken."""
    data = config.data
    height, width = data.image_size

    def captions(number: int) -> torch.Tensor:
        ids = torch.randint(1, vocab_size - 3, (number, data.text_length))
        ids[:, -1] = vocab_size - 1
        return ids

    batch = {
        "images": torch.randn(size, 3, height, width),
        "caption_ids": captions(size),
        "pids": torch.randint(10, (size,)),
        "index": torch.randint(NUM_PAIRS, (size,)),
        "support_images": torch.randn(size * data.support_images, 3, height, width),
        "support_caption_ids": captions(size * data.support_captions),
    }
    for kind, number in (("image", data.support_images), ("caption", data.support_captions)):
        batch[f"support_{kind}_mask"] = torch.ones(size, number, dtype=torch.bool)
        batch[f"support_{kind}_pairs"] = torch.randint(NUM_PAIRS, (size, number))
    return {name: value.to(default_device()) for name, value in batch.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/lcr2s.yaml", help="of a student; default: configs/lcr2s.yaml")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a step; default: 8")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each way, taken in turns; default: 5")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    teacher_config = load_config(config.teacher.config or "configs/lcr2s_teacher.yaml")
    tasks = {way: build(way, config, teacher_config).train() for way in WAYS}
    batch = random_batch(config, arguments.batch, tasks[WAYS[0]].encoder.vocab_size)
    print(f"{describe_device(default_device())}, {arguments.batch} pairs, {arguments.steps} steps each, fp32")
    print(compare_steps(tasks, batch, arguments.steps))


if __name__ == "__main__":
    main()
