"""Time of a student's training step (forward and backward) beside the baseline's, with and without a cached teacher."""

import torch

from benchmarks.common.random_batch import NUM_PAIRS
from benchmarks.common.step_timing import steps_program
from configs.schema import Config, load_config
from model.build import build_task
from model.task import RetrievalTask
from model.teacher import CachedTeacher, Teacher
from utils.distributed import default_device

WAYS = ("baseline", "cached teacher", "teacher in every step")


def build(way: str, config: Config, teacher_config: Config | None = None) -> RetrievalTask:
    """A student with random weights; the baseline is the student without what distils."""
    losses = {name: options for name, options in config.losses.items() if way != WAYS[0] or "distill" not in name}
    task = build_task(Config(data=config.data, model=config.model, losses=losses), 10, pretrained=False)
    if way != WAYS[0]:
        teacher_config = teacher_config or load_config(config.teacher.config or "configs/lcr2s_teacher.yaml")
        teacher = Teacher(build_task(teacher_config, None, pretrained=False).encoder)
        if way == WAYS[1]:
            cached = CachedTeacher(teacher)
            cached.fill(*(torch.randn(NUM_PAIRS, task.encoder.embed_dim) for _ in range(2)))
            task.learn_from(cached)
        else:
            task.learn_from(teacher)
    return task.to(default_device())


if __name__ == "__main__":
    steps_program(__doc__, "configs/lcr2s.yaml", WAYS, build)
