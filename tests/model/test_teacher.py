"""Frozen teachers: enriched embeddings for the student, no gradient, no trace in the student's weights."""

import copy
from pathlib import Path

import torch

from model.build import build_task
from model.teacher import Teacher
from processor import training
from solver.optimizer import build_optimizer
from tests.helpers.configs import tiny_config
from tests.helpers.loaders import fields_of
from tests.helpers.tasks import loader_of, student_config, student_of, task_of
from utils.checkpoint import load_checkpoint


def test_the_teacher_is_frozen(root: Path, teacher_run: Path) -> None:
    """The teacher gets no gradient, does not change, and stays in evaluation mode while the student trains."""
    task = student_of(student_config(root, teacher_run))
    teacher = task.teacher
    assert isinstance(teacher, Teacher)
    before = copy.deepcopy(teacher.state_dict())
    loader = loader_of(student_config(root, teacher_run), task)
    optimizer = build_optimizer(student_config(root, teacher_run).solver, task.named_parameters())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    task.train()
    for batch in fields_of(loader.epoch(1)):
        loss, terms = task(batch)
        loss.backward()
        optimizer.step()
        assert {"sdm_loss", "distill_features_loss", "distill_relations_loss"} == set(terms)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    teacher.train()
    assert not any(module.training for module in teacher.modules())


def test_the_teacher_says_its_enriched_embeddings(root: Path, teacher_run: Path) -> None:
    config = student_config(root, teacher_run)
    student = student_of(config)
    batch = next(iter(fields_of(loader_of(config, student).epoch(1))))
    step = student.gathered_step(batch)
    own = tiny_config("lcr2s_teacher", root)
    trained = build_task(own, 8)
    trained.load_state_dict(load_checkpoint(teacher_run / "last.pt")["model"])
    expected = trained.eval().gathered_step(batch)
    assert step.teacher is not None
    torch.testing.assert_close(step.teacher, (expected.image.detach(), expected.text.detach()))
    assert not any(side.requires_grad for side in step.teacher)


def test_a_plain_encoder_can_teach_too(root: Path, tmp_path: Path) -> None:
    run = training.train(tiny_config("baseline", root), tmp_path / "run")
    student = student_of(student_config(root, run))
    assert not [name for name in student.inputs if name.startswith("support_")]
    batch = next(iter(fields_of(loader_of(student_config(root, run), student).epoch(1))))
    loss, _ = student(batch)
    assert loss.isfinite()


# --- the student ------------------------------------------------------------------------------------------------------


def test_the_students_weights_are_the_baselines(root: Path, teacher_run: Path) -> None:
    """Student and baseline have the same tensors and bitwise equal outputs."""
    config = student_config(root, teacher_run)
    student, baseline = student_of(config), task_of(tiny_config("baseline", root), seed=5)
    assert set(student.state_dict()) == set(baseline.state_dict())
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in baseline.parameters())
    baseline.load_state_dict(student.state_dict())
    batch = next(iter(fields_of(loader_of(config, student).epoch(1))))
    for name, field in (("encode_image", "images"), ("encode_text", "caption_ids")):
        ours, theirs = (getattr(task, name)(batch[field]).embedding for task in (student, baseline))
        assert torch.equal(ours, theirs)


def test_without_weight_a_step_is_the_baselines(root: Path, teacher_run: Path) -> None:
    """Loss and gradients are bitwise equal."""
    config = student_config(root, teacher_run, "losses.distill_features.weight=0", "losses.distill_relations.weight=0")
    student = student_of(config)
    baseline = task_of(tiny_config("baseline", root, "losses.itc=null", "losses.sdm={}"))
    batch = next(iter(fields_of(loader_of(config, student).epoch(1))))
    losses = [task(batch)[0] for task in (student, baseline)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    for ours, theirs in zip(student.parameters(), baseline.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
