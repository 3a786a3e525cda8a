"""Runs with a teacher: a student started from it, trained, evaluated, and the joint form."""

from pathlib import Path

import torch

from model.load import load_init
from processor import training
from tests.helpers.configs import tiny_config
from tests.helpers.programs import evaluate
from tests.helpers.runs import lines_of
from tests.helpers.tasks import student_config, task_of
from utils.checkpoint import load_checkpoint


def test_a_student_may_start_from_its_teacher(root: Path, teacher_run: Path) -> None:
    config = student_config(root, teacher_run, f"init.path={teacher_run / 'last.pt'}")
    student = task_of(config)
    report = load_init(student, config.init)
    assert report is not None and not report.missing
    assert report.unexpected and all(name.startswith("encoder.fusion.") for name in report.unexpected)
    trained = load_checkpoint(teacher_run / "last.pt")["model"]
    assert all(torch.equal(value, trained[name]) for name, value in student.state_dict().items())


def test_a_student_is_trained_saved_and_tested_like_any_other(root: Path, teacher_run: Path, tmp_path: Path) -> None:
    run = training.train(student_config(root, teacher_run, "train.epochs=2"), tmp_path / "run")
    assert not [name for name in load_checkpoint(run / "last.pt")["model"] if "teacher" in name or "fusion" in name]
    line = lines_of(run)[-1]
    assert 0 < line["distill_features_loss"] < 4 and line["distill_relations_loss"] > 0
    assert evaluate("--run", run, "--checkpoint", "last")["t2i"] == line["test"]
    elsewhere = evaluate("--run", run, "--checkpoint", "last", "--set", "teacher.checkpoint=null")
    assert elsewhere["t2i"] == line["test"]


def test_a_joint_run(root: Path, tmp_path: Path) -> None:
    config = tiny_config("lcr2s_joint", root, "data.num_instances=2", "train.epochs=2")
    run = training.train(config, tmp_path / "run")
    line = lines_of(run)[-1]
    assert {"sdm_loss", "distill_features_loss", "distill_relations_loss"} <= set(line)
    results = evaluate("--run", run, "--checkpoint", "last")
    assert set(results) == {"t2i"} and results["t2i"] == line["test"]
