"""LCR2S-style procedures: the teacher's training, the student's, the cached and the joint form."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train as train_program
from benchmarks import distillation, token_selection
from benchmarks.common import random_batch, step_timing
from configs.schema import Config, load_config
from datasets.annotations import load_annotations
from datasets.loaders import TrainLoader, build_train_loader, data_tokenizer
from datasets.transforms import build_transform
from model.build import build_task, build_teacher, needs_teacher, resolve
from model.encoders.fusion import FusionEncoder
from model.load import load_init
from model.task import RetrievalTask
from model.teacher import CachedTeacher, Teacher
from processor.teacher_cache import fill_cache
from solver.optimizer import build_optimizer
from tests.conftest import ROOT, TINY
from tests.test_command_line import run_program
from tests.test_transfer import evaluate
from tools import teacher_readout
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import to_yaml
from utils.errors import CheckpointError, ConfigError
from utils.metrics import retrieval_metrics

CONFIGS = ROOT / "configs"
CPU = torch.device("cpu")


def tiny_config(name: str, root: Path, *overrides: str) -> Config:
    return resolve(load_config(CONFIGS / f"{name}.yaml", [*TINY, f"data.root={root}", *overrides]))


def task_of(config: Config, seed: int = 0) -> RetrievalTask:
    torch.manual_seed(seed)
    return build_task(config, num_pids=8)


def loader_of(config: Config, task: RetrievalTask) -> TrainLoader:
    annotations = load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024)
    return build_train_loader(
        config.data,
        annotations,
        tokenizer,
        fields=task.inputs | {"index"},
        full_text=task.full_text,
        seed=1,
        pin_memory=False,
    )


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stir(module: torch.nn.Module) -> None:
    """So that fusion does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def teacher_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that was trained for two epochs."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    fast = ["train.epochs=2", "solver.lr=1e-3", "solver.eps=1e-8", "solver.schedule.warmup_epochs=0"]
    return train_program.train(tiny_config("lcr2s_teacher", root, *fast), run)


# --- the teacher ----------------------------------------------------------------------------------------------------


def test_the_teacher_starts_as_the_baseline(root: Path) -> None:
    """16: at zero initialisation, loss and gradients of the towers are the baseline's."""
    config = tiny_config("lcr2s_teacher", root)
    teacher = task_of(config)
    baseline = task_of(tiny_config("baseline", root, "losses.itc=null", "losses.sdm={}"), seed=1)
    baseline.load_state_dict(teacher.state_dict(), strict=False)
    batch = next(iter(loader_of(config, teacher).epoch(1)))
    losses = [task(batch)[0] for task in (teacher, baseline)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    found = dict(teacher.named_parameters())
    for name, parameter in baseline.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    fusion = teacher.encoder.fusion["image"]  # type: ignore[index, union-attr]
    assert fusion.out.weight.grad.any() and not fusion.hidden.weight.grad.any()  # type: ignore[union-attr, operator]


def test_what_the_losses_see_is_enriched_and_what_is_evaluated_is_not(root: Path) -> None:
    config = tiny_config("lcr2s_teacher", root)
    task = task_of(config)
    encoder = task.encoder
    assert isinstance(encoder, FusionEncoder)
    stir(encoder.fusion)
    batch = next(iter(loader_of(config, task).epoch(1)))
    step = task.encode(batch)
    images = encoder.encode_image(batch["images"]).embedding
    supports = torch.zeros(*batch["support_image_mask"].shape, 64)
    supports[batch["support_image_mask"]] = encoder.encode_image(batch["support_images"]).embedding
    expected = encoder.fusion["image"](images, supports, batch["support_image_mask"])
    torch.testing.assert_close(step.image, expected)
    assert not torch.allclose(step.image, images)
    captions = torch.zeros(*batch["support_caption_mask"].shape, 64)
    captions[batch["support_caption_mask"]] = encoder.encode_text(batch["support_caption_ids"]).embedding
    text = encoder.encode_text(batch["caption_ids"]).embedding
    torch.testing.assert_close(step.text, encoder.fusion["text"](text, captions, batch["support_caption_mask"]))


def test_both_modalities_have_their_own_fusion(root: Path) -> None:
    encoder = task_of(tiny_config("lcr2s_teacher", root)).encoder
    assert isinstance(encoder, FusionEncoder)
    parameters = [set(map(id, encoder.fusion[tower].parameters())) for tower in ("image", "text")]
    assert not parameters[0] & parameters[1]  # 8


def test_the_support_may_go_without_gradient(root: Path) -> None:
    gradients = []
    for grad in ("true", "false"):
        config = tiny_config("lcr2s_teacher", root, f"model.support_grad={grad}")
        task = task_of(config)
        stir(task.encoder.fusion)  # type: ignore[arg-type]
        batch = next(iter(loader_of(config, task).epoch(1)))
        calls: list[bool] = []
        encode = task.encoder.encode_image
        task.encoder.encode_image = lambda x, f=encode, c=calls: c.append(torch.is_grad_enabled()) or f(x)  # type: ignore[method-assign, misc, assignment]
        loss, _ = task(batch)
        loss.backward()
        assert calls == [True, grad == "true"]
        gradients.append(task.encoder.image.projection.weight.grad.clone())  # type: ignore[union-attr, operator]
    assert not torch.allclose(*gradients)


def test_a_batch_without_any_support_trains(root: Path) -> None:
    """20: nobody has another image, and the loss and all gradients are finite."""
    config = tiny_config("lcr2s_teacher", root)
    task = task_of(config)
    loader = loader_of(config, task)
    for of in (loader.pairs.supports.images_of, loader.pairs.supports.captions_of):  # type: ignore[union-attr]
        of.update({pid: pairs[:0] for pid, pairs in of.items()})
    loss, _ = task(next(iter(loader.epoch(1))))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in task.parameters())


def test_heads_must_divide_the_dimensions(root: Path) -> None:
    for heads in ("5", "0"):
        with pytest.raises(ConfigError, match=r"model\.heads: must divide model\.embed_dim, 64"):
            build_task(tiny_config("lcr2s_teacher", root, f"model.heads={heads}"), 3)


# --- the student ----------------------------------------------------------------------------------------------------


def student_config(root: Path, run: Path, *overrides: str) -> Config:
    return tiny_config("lcr2s", root, f"teacher.checkpoint={run / 'last.pt'}", *overrides)


def student_of(config: Config) -> RetrievalTask:
    task = task_of(config)
    assert needs_teacher(config)
    task.learn_from(build_teacher(config))
    return task


def test_without_a_teacher_the_error_says_how_to_make_one(monkeypatch, capsys) -> None:
    for more in ([], ["--print-config"]):
        arguments = ["--config", CONFIGS / "lcr2s.yaml", *more]  # without data and weights: this comes first
        status, _, err = run_program(train_program.main, monkeypatch, capsys, *arguments)
        assert status == 1 and "Traceback" not in err
        assert "python train.py --config configs/lcr2s_teacher.yaml --run runs/teacher\n" in err
        assert "--set teacher.checkpoint=runs/teacher/last.pt" in err


def test_the_teacher_is_frozen(root: Path, teacher_run: Path) -> None:
    """13: no gradient, no change, and evaluation mode whatever is said to the student."""
    task = student_of(student_config(root, teacher_run))
    teacher = task.teacher
    assert isinstance(teacher, Teacher)
    before = copy.deepcopy(teacher.state_dict())
    loader = loader_of(student_config(root, teacher_run), task)
    optimizer = build_optimizer(student_config(root, teacher_run).solver, task.named_parameters())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    task.train()
    for batch in loader.epoch(1):
        loss, terms = task(batch)
        loss.backward()
        optimizer.step()
        assert {"sdm_loss", "distill_features_loss", "distill_relations_loss"} == set(terms)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    teacher.train()
    assert not any(module.training for module in teacher.modules())


def test_the_students_weights_are_the_baselines(root: Path, teacher_run: Path) -> None:
    """24: no tensor more, and the same outputs, bitwise."""
    config = student_config(root, teacher_run)
    student, baseline = student_of(config), task_of(tiny_config("baseline", root), seed=5)
    assert set(student.state_dict()) == set(baseline.state_dict())
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in baseline.parameters())
    baseline.load_state_dict(student.state_dict())
    batch = next(iter(loader_of(config, student).epoch(1)))
    for name, field in (("encode_image", "images"), ("encode_text", "caption_ids")):
        ours, theirs = (getattr(task, name)(batch[field]).embedding for task in (student, baseline))
        assert torch.equal(ours, theirs)


def test_without_weight_a_step_is_the_baselines(root: Path, teacher_run: Path) -> None:
    """15: exactly."""
    config = student_config(root, teacher_run, "losses.distill_features.weight=0", "losses.distill_relations.weight=0")
    student = student_of(config)
    baseline = task_of(tiny_config("baseline", root, "losses.itc=null", "losses.sdm={}"))
    batch = next(iter(loader_of(config, student).epoch(1)))
    losses = [task(batch)[0] for task in (student, baseline)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    for ours, theirs in zip(student.parameters(), baseline.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_the_teacher_says_its_enriched_embeddings(root: Path, teacher_run: Path) -> None:
    config = student_config(root, teacher_run)
    student = student_of(config)
    batch = next(iter(loader_of(config, student).epoch(1)))
    step = student.encode(batch)
    own = tiny_config("lcr2s_teacher", root)
    trained = build_task(own, 8)
    trained.load_state_dict(load_checkpoint(teacher_run / "last.pt")["model"])
    expected = trained.eval().encode(batch)
    assert step.teacher is not None
    torch.testing.assert_close(step.teacher, (expected.image.detach(), expected.text.detach()))
    assert not any(side.requires_grad for side in step.teacher)


def test_a_student_may_start_from_its_teacher(root: Path, teacher_run: Path) -> None:
    config = student_config(root, teacher_run, f"init.path={teacher_run / 'last.pt'}")
    student = task_of(config)
    report = load_init(student, config.init)
    assert report is not None and not report.missing
    assert report.unexpected and all(name.startswith("encoder.fusion.") for name in report.unexpected)
    trained = load_checkpoint(teacher_run / "last.pt")["model"]
    assert all(torch.equal(value, trained[name]) for name, value in student.state_dict().items())


def test_a_plain_encoder_can_teach_too(root: Path, tmp_path: Path) -> None:
    run = train_program.train(tiny_config("baseline", root), tmp_path / "run")
    student = student_of(student_config(root, run))
    assert not [name for name in student.inputs if name.startswith("support_")]
    batch = next(iter(loader_of(student_config(root, run), student).epoch(1)))
    loss, _ = student(batch)
    assert loss.isfinite()


def test_a_student_is_trained_saved_and_tested_like_any_other(root: Path, teacher_run: Path, tmp_path: Path) -> None:
    run = train_program.train(student_config(root, teacher_run, "train.epochs=2"), tmp_path / "run")
    assert not [name for name in load_checkpoint(run / "last.pt")["model"] if "teacher" in name or "fusion" in name]
    line = lines_of(run)[-1]
    assert 0 < line["distill_features_loss"] < 4 and line["distill_relations_loss"] > 0
    assert evaluate("--run", run, "--checkpoint", "last")["t2i"] == line["test"]
    elsewhere = evaluate("--run", run, "--checkpoint", "last", "--set", "teacher.checkpoint=null")  # 25
    assert elsewhere["t2i"] == line["test"]


@pytest.mark.parametrize("override", ["data.image_size=[32, 32]", "data.text_length=40"])
def test_a_teacher_of_other_inputs_is_refused(override: str, root: Path, teacher_run: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{override.split('=')[0]}: .*but the teacher .* was trained with"):
        build_teacher(student_config(root, teacher_run, override))


def test_bad_teachers_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such checkpoint"):
        build_teacher(student_config(root, tmp_path))
    save_checkpoint(tmp_path / "last.pt", {"model": {"encoder.x": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=r"is no checkpoint of train\.py"):
        build_teacher(student_config(root, tmp_path))


# --- the cached form ------------------------------------------------------------------------------------------------


def test_the_cached_teacher_says_what_the_teacher_would(root: Path, teacher_run: Path) -> None:
    config = student_config(root, teacher_run)
    explicit, cached = student_of(config), task_of(config)
    cached.learn_from(CachedTeacher(build_teacher(config)))
    assert not {"support_images", "support_caption_ids"} & cached.inputs and "index" in cached.inputs
    loader, light = loader_of(config, explicit), loader_of(config, cached)
    loader.pairs.transform = build_transform(config.data, train=False)  # not augmented, as the table is
    assert isinstance(cached.teacher, CachedTeacher)
    fill_cache(cached.teacher, light.pairs, config, CPU)
    assert cached.teacher.source is None  # the towers are let go of
    assert cached.teacher.images.shape == cached.teacher.captions.shape == (32, 64)
    for full, small in zip(loader.epoch(2), light.epoch(2), strict=True):
        expected, found = explicit.encode(full).teacher, cached.encode(small).teacher
        assert expected is not None and found is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tool, method", [(token_selection, "rde"), (distillation, "lcr2s")])
def test_the_benchmarks_of_steps_print_a_line_for_each_way(
    tool, method: str, root: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_config(method, root)))

    def build(way: str, config: Config) -> RetrievalTask:
        own = [tiny_config("lcr2s_teacher", root)] if method == "lcr2s" else []
        return tool.build(way, config, *own)

    monkeypatch.setattr("sys.argv", ["program", "--batch", "2", "--steps", "1"])
    step_timing.steps_program("", str(tmp_path / "tiny.yaml"), tool.WAYS, build)
    lines = capsys.readouterr().out.splitlines()
    assert "2 pairs, 1 steps each" in lines[0] and len(lines) == 1 + len(tool.WAYS)
    assert f"1.00 x {tool.WAYS[0]}" in lines[1]


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
        step_timing.step_seconds(task, random_batch.random_batch(config, 3, 1024))
        seen[way] = dict(rows)
    assert seen == {
        "baseline": {"image": 3, "text": 3},
        "cached teacher": {"image": 3, "text": 3},
        "teacher in every step": {"image": 3 + 3 + 12, "text": 3 + 3 + 12},
    }


def test_a_cached_run(root: Path, teacher_run: Path, tmp_path: Path) -> None:
    config = student_config(root, teacher_run, "teacher.cache=true", "train.epochs=2")
    (line, last) = lines_of(train_program.train(config, tmp_path / "run"))
    assert 0 < last["distill_features_loss"] < 4
    noisy = student_config(root, teacher_run, "teacher.cache=true", "data.noise_rate=0.5")
    run = train_program.train(noisy, tmp_path / "noisy")
    assert lines_of(run)[0]["distill_features_loss"] != line["distill_features_loss"]


def test_a_cache_needs_every_image(root: Path, teacher_run: Path, tmp_path: Path) -> None:
    config = student_config(root, teacher_run, "teacher.cache=true", "data.on_bad_image=skip")
    with pytest.raises(ConfigError, match=r"teacher\.cache: needs every training image"):
        train_program.train(config, tmp_path / "run")


@pytest.mark.parametrize("override", ["data.views=2", "data.text_levels=[sentence,word]"])
def test_a_cache_is_of_one_view_and_one_text(override: str, root: Path, tmp_path: Path) -> None:
    plain = train_program.train(tiny_config("baseline", root), tmp_path / "plain")
    config = student_config(root, plain, "teacher.cache=true", override)
    with pytest.raises(ConfigError, match=r"teacher\.cache: knows one view and one text of a pair"):
        train_program.train(config, tmp_path / "run")


def test_a_plain_teacher_can_be_cached(root: Path, tmp_path: Path) -> None:
    run = train_program.train(tiny_config("baseline", root), tmp_path / "run")
    config = student_config(root, run, "teacher.cache=true")
    (line,) = lines_of(train_program.train(config, tmp_path / "student"))
    assert line["distill_features_loss"] > 0


# --- the joint form -------------------------------------------------------------------------------------------------


def test_the_joint_form_teaches_itself(root: Path) -> None:
    config = tiny_config("lcr2s_joint", root)
    task = task_of(config)
    assert config.model["name"] == "batch_fusion" and not needs_teacher(config)
    stir(task.encoder.fusion)  # type: ignore[arg-type]
    batch = next(iter(loader_of(config, task).epoch(1)))
    step = task.encode(batch)
    (plain, enriched), (_, texts) = (step.embeddings[0][0], step.embeddings[1][0]), step.embeddings[1]
    assert torch.equal(plain, task.encode_image(batch["images"]).embedding)
    assert step.teacher is not None and not step.teacher[0].requires_grad
    assert torch.equal(step.teacher[0], enriched) and torch.equal(step.teacher[1], texts)
    assert enriched.requires_grad and not torch.allclose(plain, enriched)
    loss, terms = task(batch)
    sdm = task.objectives["sdm"].pair_losses(step).mean(dim=1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(terms["sdm_loss"], sdm.sum().detach())  # of both embeddings
    loss.backward()
    assert task.encoder.fusion["image"].hidden.weight.grad.any()  # type: ignore[index, union-attr, operator]


def test_a_joint_run(root: Path, tmp_path: Path) -> None:
    config = tiny_config("lcr2s_joint", root, "data.num_instances=2", "train.epochs=2")
    run = train_program.train(config, tmp_path / "run")
    line = lines_of(run)[-1]
    assert {"sdm_loss", "distill_features_loss", "distill_relations_loss"} <= set(line)
    results = evaluate("--run", run, "--checkpoint", "last")
    assert set(results) == {"t2i"} and results["t2i"] == line["test"]


def test_rate_groups_of_the_fusion(root: Path) -> None:
    for name in ("lcr2s_teacher", "lcr2s_joint"):
        config = tiny_config(name, root)
        task = task_of(config)
        groups = build_optimizer(config.solver, task.named_parameters()).param_groups
        rates: dict[int, float] = {id(p): group["base_lr"] for group in groups for p in group["params"]}
        fusion: Tensor = task.encoder.fusion["image"].out.weight  # type: ignore[index, union-attr, assignment]
        assert rates[id(fusion)] == pytest.approx(5e-5)


# --- the read-out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, people", [("train", 8), ("test", 4)])
def test_the_read_out_ranks_one_view_of_each_person(
    split: str, people: int, teacher_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(similarity: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> dict[str, float]:
        seen.append((similarity, query_pids, gallery_pids))
        return retrieval_metrics(similarity, query_pids, gallery_pids)

    monkeypatch.setattr(teacher_readout, "retrieval_metrics", spy)
    rows = teacher_readout.read_out(teacher_run, split, "last", [])
    assert list(rows) == ["plain", "with support"]
    for similarity, queries, gallery in seen:
        assert similarity.shape == (people, people) and queries.tolist() == gallery.tolist() == list(range(people))
    assert not torch.allclose(seen[0][0], seen[1][0])


def test_the_read_out_as_a_program(teacher_run: Path, root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    status, out, _ = run_program(teacher_readout.main, monkeypatch, capsys, "--run", teacher_run, "--split", "test")
    assert status == 0 and "one view, test" in out and "with support" in out
    plain = train_program.train(tiny_config("baseline", root), tmp_path / "run")
    status, out, _ = run_program(teacher_readout.main, monkeypatch, capsys, "--run", plain, "--split", "test")
    assert status == 0 and "plain" in out and "with support" not in out
