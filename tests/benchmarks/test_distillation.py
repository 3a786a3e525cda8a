"""benchmarks/distillation.py: tower passes of a step with a cached teacher and with a teacher in every step."""

from collections import Counter
from pathlib import Path

from benchmarks import distillation
from benchmarks.common import step_timing
from processor.random_batch import random_batch
from tests.helpers.configs import tiny_config


def test_a_cached_step_runs_the_towers_as_often_as_the_baselines(root: Path) -> None:
    config, own = tiny_config("lcr2s", root), tiny_config("lcr2s_teacher", root)
    seen = {}
    for way in distillation.WAYS:
        task = distillation.build(way, config, own)
        rows: Counter[str] = Counter()
        towers = [module for module in (task, task.teacher) if module is not None]
        for name in ("image", "text"):
            for module in towers:
                tower = getattr(getattr(module, "encoder", None), name, None)
                if tower is not None:
                    tower.register_forward_pre_hook(lambda _, args, n=name, r=rows: r.update({n: len(args[0])}))
        step_timing.TrainingStep(task, config)(random_batch(config, 3, 1024, task.inputs))
        seen[way] = dict(rows)
    assert seen == {
        "baseline": {"image": 3, "text": 3},
        "cached teacher": {"image": 3, "text": 3},
        "teacher in every step": {"image": 3 + 3 + 12, "text": 3 + 3 + 12},
    }
