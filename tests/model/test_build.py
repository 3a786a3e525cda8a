"""Building from a config: defaults spelt out, settings that exclude each other, teachers that do not fit."""

from pathlib import Path

import pytest
import torch

import train as train_program
from configs.schema import load_config
from model.build import build_encoder, build_task, build_teacher
from model.objectives.consensus import FITS
from processor import training
from processor.resolve import resolve
from tests.helpers.configs import CONFIGS, NOISE, ROOT, config_of, rde_config
from tests.helpers.programs import run_program
from tests.helpers.steps import exact_task
from tests.helpers.tasks import student_config, task_of
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import to_plain
from utils.errors import CheckpointError, ConfigError


def test_resolving_spells_out_every_option() -> None:
    config = resolve(load_config(ROOT / "configs/irra.yaml"))
    assert config.losses["mlm"] == {"weight": 1.0, "depth": 4, "clean_captions": False}
    assert config.model["image"]["pretrained"] is True
    assert to_plain(config) == to_plain(resolve(config))


def test_batch_statistics_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"^train\.accumulate: must be 1, got 2, .*whole batch.*model\.bn=frozen"):
        exact_task(config_of("rde", root, "model.bn=batch", "train.accumulate=2"))


@pytest.mark.parametrize(
    "overrides, fit",
    [([], "short"), ([NOISE], "long"), (["data.dataset=rstpreid"], "long"), (["data.noise_rate=0.2"], "short")],
)
def test_the_fit_follows_the_noise_and_the_data_set(overrides: list[str], fit: str, root: Path) -> None:
    task = task_of(rde_config(root, *overrides))
    assert task.objectives["tal"].fit == FITS[fit]  # type: ignore[union-attr]


def test_no_builder_leaves_random_weights_in_place_of_the_initial_checkpoint(root: Path, tmp_path: Path) -> None:
    trained = build_task(config_of("baseline", root))
    save_checkpoint(tmp_path / "best.pt", {"model": trained.state_dict()})
    config = config_of("baseline", root, f"init.path={tmp_path / 'best.pt'}")
    for name, value in build_task(config).state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])
    with pytest.raises(ConfigError, match=r"init\.path: has the weights .* use build_task"):
        build_encoder(config)


# --- teachers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.train(config_of("irra", root, "train.epochs=2"), tmp_path_factory.mktemp("faults") / "run")


def test_without_a_teacher_the_error_says_how_to_make_one(monkeypatch, capsys) -> None:
    for more in ([], ["--print-config"]):
        arguments = ["--config", CONFIGS / "lcr2s.yaml", *more]  # checked before data and weights
        status, _, err = run_program(train_program.main, monkeypatch, capsys, *arguments)
        assert status == 1 and "Traceback" not in err
        assert "python train.py --config configs/lcr2s_teacher.yaml --run runs/teacher\n" in err
        assert "--set teacher.checkpoint=runs/teacher/last.pt" in err


@pytest.mark.parametrize("override", ["data.image_size=[32, 32]", "data.text_length=40"])
def test_a_teacher_of_other_inputs_is_refused(override: str, root: Path, teacher_run: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{override.split('=')[0]}: .*the teacher .* was trained with .*, got"):
        build_teacher(student_config(root, teacher_run, override))


def test_bad_teachers_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such checkpoint"):
        build_teacher(student_config(root, tmp_path))
    save_checkpoint(tmp_path / "last.pt", {"model": {"encoder.x": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=r"has no config inside.*use a checkpoint of train\.py"):
        build_teacher(student_config(root, tmp_path))


@pytest.mark.parametrize("text", ["a: [", "5", "nothing", "modle: {}", "losses: 3"])
def test_a_teacher_whose_config_cannot_be_read_is_named(text: str, root: Path, run: Path, tmp_path: Path) -> None:
    content = load_checkpoint(run / "last.pt")
    save_checkpoint(tmp_path / "teacher.pt", content | {"config": text})
    config = config_of("lcr2s", root, f"teacher.checkpoint={tmp_path / 'teacher.pt'}")
    with pytest.raises(CheckpointError, match=r"teacher\.pt: the config inside does not fit this version"):
        build_teacher(config)


def test_a_teacher_of_other_dimensions_is_said(root: Path, run: Path, tmp_path: Path) -> None:
    options = [f"teacher.checkpoint={run / 'last.pt'}", "model.embed_dim=32"]
    message = r"distill_features: needs a teacher with the student's 32 dimensions, got 64"
    with pytest.raises(ConfigError, match=message):
        training.train(config_of("lcr2s", root, *options), tmp_path / "run")
