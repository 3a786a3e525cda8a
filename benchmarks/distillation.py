"""Time of a student's training step (forward and backward) relative to the baseline, with and without a cache."""

import torch

from benchmarks.common.step_timing import steps_program
from configs.schema import Config, load_config
from model.build import build_task
from model.task import RetrievalTask
from model.teacher import CachedTeacher, Teacher
from processor.random_batch import NUM_PAIRS
from utils.distributed import default_device
from utils.errors import ConfigError

WAYS = ("baseline", "cached teacher", "teacher in every step")


def build(way: str, config: Config, teacher_config: Config | None = None) -> RetrievalTask:
    """A student with random weights; the baseline is the student without distillation losses."""
    if not any("distill" in name for name in config.losses):
        raise ConfigError("--config: needs distillation losses, as configs/lcr2s.yaml has, got none")
    losses = {name: options for name, options in config.losses.items() if way != WAYS[0] or "distill" not in name}
    task = build_task(Config(data=config.data, model=config.model, losses=losses), 10, weights=False, teacher=False)
    if way == WAYS[0]:
        return task.to(default_device())
    teacher_config = teacher_config or load_config(config.teacher.config or "configs/lcr2s_teacher.yaml")
    teacher: Teacher | CachedTeacher = Teacher(build_task(teacher_config, weights=False).encoder)
    if way == WAYS[1]:
        assert isinstance(teacher, Teacher)
        teacher = CachedTeacher(teacher)
        teacher.fill(*(torch.randn(NUM_PAIRS, task.encoder.embed_dim) for _ in range(2)))
    task = RetrievalTask(task.encoder, dict(task.named_objectives()), teacher)
    return task.to(default_device())


if __name__ == "__main__":
    steps_program(__doc__, "configs/lcr2s.yaml", WAYS, build)
