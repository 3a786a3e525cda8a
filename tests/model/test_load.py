"""Loading weights: all tensors in place or none, with a report of missing, unexpected, resized and skipped ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import InitConfig, load_config
from model.build import build_task
from model.checkpoints.formats import FORMATS, irra, own
from model.checkpoints.grids import resize_position_grid
from model.load import LoadReport, load_converted, load_init, load_weights
from model.task import RetrievalTask
from tests.helpers.checkpoints import encoder_only, fmfa_head, our_clip, save_plain, save_torchscript, their_clip
from tests.helpers.configs import config_of
from tests.helpers.fuzzing import FUZZ, PLAIN
from tests.helpers.golden import RECIPE, close, features_are_the_authors, golden_batch, golden_overrides, golden_weights
from utils.checkpoint import save_checkpoint
from utils.config import to_yaml
from utils.errors import CheckpointError, ConfigError


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in their_clip((224, 224)).state_dict().items()}
    save_torchscript(state, tmp_path / "clip.pt")
    ours = our_clip()
    load_weights(ours, tmp_path / "clip.pt")
    loaded = ours.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    weight = loaded["encoder.text.trunk.embeddings.token_embedding.weight"]
    assert torch.equal(weight, state["token_embedding.weight"].float())


def test_published_checkpoint_file_loads(model_golden: dict[str, np.ndarray], tmp_path) -> None:
    weights = golden_weights(model_golden)
    save_checkpoint(tmp_path / "best.pth", {"model": weights, "epoch": 3})
    fresh = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    report = load_weights(fresh, tmp_path / "best.pth", format="irra")
    assert not report.missing and not report.unexpected and not report.resized
    close(fresh.encode_image(golden_batch(model_golden)["images"]).embedding, model_golden["out/encode_image"])


def test_openai_weights_load_into_the_encoder_and_the_heads_start_fresh(
    model_golden: dict[str, np.ndarray], tmp_path
) -> None:
    prefix = "w/base_model."
    weights = {n.removeprefix(prefix): torch.from_numpy(v) for n, v in model_golden.items() if n.startswith(prefix)}
    weights["logit_scale"] = torch.tensor(4.6)  # in OpenAI's archive, but not a weight of this model
    save_checkpoint(tmp_path / "clip.pt", {name: value.half() for name, value in weights.items()})
    fresh = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    report = load_weights(fresh, tmp_path / "clip.pt", format="openai")
    assert not report.unexpected and all(name.startswith("objectives.") for name in report.missing)
    assert next(fresh.parameters()).dtype == torch.float32
    close(fresh.encode_image(golden_batch(model_golden)["images"]).embedding, model_golden["out/encode_image"], 2e-2)


def test_our_own_checkpoint_loads_with_and_without_its_heads(
    model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    config = load_config(RECIPE, golden_overrides(model_golden))
    first, second = build_task(config, num_pids=11), build_task(config, num_pids=5)
    torch.save({"model": first.state_dict(), "epoch": 2}, tmp_path / "best.pt")
    report = load_weights(second, tmp_path / "best.pt")
    assert report.format == "own" and len(report.dropped) == 2 and not report.missing
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]) == (".classifier." not in name)
    baseline = load_config(RECIPE, [*golden_overrides(model_golden), "losses.mlm=null", "losses.itc={}"])
    report = load_init(build_task(baseline, num_pids=11), InitConfig(str(tmp_path / "best.pt")))
    assert report is not None and {name.split(".")[1] for name in report.unexpected} == {"mlm"}
    assert own(first.state_dict()).keys() == first.state_dict().keys()


def test_a_classifier_of_another_size_is_dropped_and_named(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_plain(fmfa_head(golden_weights(model_golden)), tmp_path / "best0.pth")
    config = load_config(RECIPE, golden_overrides(model_golden))
    training, testing = build_task(config, num_pids=11), build_task(config, None)
    fresh = training.state_dict()["objectives.id.classifier.weight"].clone()
    report = load_weights(training, tmp_path / "best0.pth", format="fmfa")
    classifier = ["objectives.id.classifier.weight", "objectives.id.classifier.bias"]
    assert sorted(report.dropped) == sorted(classifier) and not report.missing and not report.unexpected
    assert torch.equal(training.state_dict()[classifier[0]], fresh)
    assert "other size, initialised afresh" in report.table() and classifier[0] in report.table()
    report = load_weights(testing, tmp_path / "best0.pth", format="fmfa")
    assert set(classifier) < set(report.unexpected) and not report.dropped
    (line,) = [line for line in report.table().splitlines() if "unexpected, not used" in line]
    assert "objectives.id 2" in line and "objectives.mlm" in line
    batch = golden_batch(model_golden)
    close(testing.encode_image(batch["images"]).embedding, model_golden["out/encode_image"])


def test_token_selection_starts_fresh_from_a_clip(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_plain(encoder_only(golden_weights(model_golden)), tmp_path / "clip.pth")
    sizes = [override for override in golden_overrides(model_golden) if not override.startswith("losses.")]
    task = build_task(load_config("configs/rde.yaml", [*sizes, "model.selected_dim=48"]), num_pids=11)
    report = load_weights(task, tmp_path / "clip.pth")
    assert len(report.missing) == 22 and all(name.startswith("encoder.selection.") for name in report.missing)
    assert "missing, initialised afresh" in report.table()
    features_are_the_authors(task, model_golden)


def test_tensors_may_be_skipped(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_plain(golden_weights(model_golden), tmp_path / "best.pth")
    config = load_config(RECIPE, golden_overrides(model_golden))
    task = build_task(config, num_pids=11)
    fresh = {name: value.clone() for name, value in task.state_dict().items()}
    report = load_init(task, InitConfig(str(tmp_path / "best.pth"), skip=["pos_embed$", r"mlm_head\."]))
    assert report is not None and not report.missing and not report.unexpected
    heads = [name for name in fresh if ".mlm_head." in name]
    assert sorted(report.skipped) == sorted(["encoder.image.trunk.pos_embed", *heads])
    assert "skipped, initialised afresh" in report.table() and "encoder.image.trunk.pos_embed" in report.table()
    loaded = task.state_dict()
    assert all(torch.equal(loaded[name], fresh[name]) for name in report.skipped)
    assert not torch.equal(loaded["encoder.image.trunk.cls_token"], fresh["encoder.image.trunk.cls_token"])
    load_init(task, InitConfig(str(tmp_path / "best.pth"), skip=["pos_embed", "trunk.pos_embed"]))  # they overlap
    with pytest.raises(ConfigError, match=r"init\.skip: must match a tensor of .*best\.pth, got 'positions'"):
        load_init(task, InitConfig(str(tmp_path / "best.pth"), skip=["positions"]))


def test_another_image_size_resizes_the_position_grid_and_says_so(model_golden: dict[str, np.ndarray]) -> None:
    source = torch.from_numpy(model_golden["posembed/src"])
    weights = golden_weights(model_golden)
    weights["base_model.visual.positional_embedding"] = source
    fresh = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    report = load_converted(fresh, irra(weights), LoadReport("x.pth", "irra"))
    assert report.resized == ["encoder.image.trunk.pos_embed"]
    close(fresh.state_dict()["encoder.image.trunk.pos_embed"][0], model_golden["posembed/dst"])


GRIDS: dict[str, tuple[int, list[int], list[int] | None, tuple[int, int], str]] = {
    # positions, data.image_size, init.image_size, source grid, reason
    "as published": (192, [192, 256], None, (24, 8), "as published"),
    "as published, not square": (192, [224, 224], None, (24, 8), "as published"),
    "given": (192, [384, 128], [192, 256], (12, 16), "init.image_size"),
    "given, though square": (16, [64, 64], [128, 32], (8, 2), "init.image_size"),
    "square": (196, [384, 128], None, (14, 14), "assumed, because its positions form a square"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_any_position_grid_is_resized_from_its_true_rows_and_columns(case: str, tmp_path: Path) -> None:
    positions, wanted, given, source, reason = GRIDS[case]
    weights, name = their_clip((224, 224)).state_dict(), "encoder.image.trunk.pos_embed"
    weights["visual.positional_embedding"] = torch.randn(1 + positions, 128)
    weights = {f"base_model.{theirs}": value for theirs, value in weights.items()}  # as IRRA saves them
    save_plain(weights, tmp_path / "x.pth")
    task, grid = our_clip(f"data.image_size={wanted}"), (wanted[0] // 16, wanted[1] // 16)
    report = load_init(task, InitConfig(str(tmp_path / "x.pth"), image_size=tuple(given) if given else None))
    expected = resize_position_grid(irra(weights)[name], grid, source=source)
    assert torch.equal(task.state_dict()[name], expected) and report.resized == [name]
    message = f"position grid {name}: {source[0]}x{source[1]} ({reason}) resized to {grid[0]}x{grid[1]}"
    assert any(note.startswith(message) for note in report.notes)


def test_as_many_positions_are_taken_for_the_same_grid_and_this_is_said(
    model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    save_plain(golden_weights(model_golden), tmp_path / "x.pth")
    report = load_weights(build_task(load_config(RECIPE, golden_overrides(model_golden))), tmp_path / "x.pth")
    assert not report.resized and "4x2, assumed, because the file has as many positions" in str(report.notes)
    with pytest.raises(CheckpointError, match=r"init\.image_size: no stride gives its 8 positions in images of 96x96"):
        load_weights(
            build_task(load_config(RECIPE, golden_overrides(model_golden))), tmp_path / "x.pth", image_size=(96, 96)
        )


def test_the_config_inside_our_checkpoint_tells_its_grid(root: Path, tmp_path: Path) -> None:
    name = "encoder.image.trunk.pos_embed"
    before, after = (config_of("baseline", root, f"data.image_size={size}") for size in ([64, 32], [32, 64]))
    saved, task = build_task(before), build_task(after)
    save_checkpoint(tmp_path / "best.pt", {"model": saved.state_dict(), "config": to_yaml(before)})
    report = load_weights(task, tmp_path / "best.pt")
    expected = resize_position_grid(saved.state_dict()[name], (2, 4), source=(4, 2))
    assert torch.equal(task.state_dict()[name], expected) and "4x2 (the config inside) resized to 2x4" in str(
        report.notes
    )
    assert not load_weights(build_task(before), tmp_path / "best.pt").notes


# --- refused files ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_a_weight_of_the_encoder_is_refused(model_golden: dict[str, np.ndarray]) -> None:
    weights = golden_weights(model_golden)
    fresh = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    lacking = {name: value for name, value in weights.items() if "ln_final" not in name}
    with pytest.raises(
        CheckpointError, match=r"x\.pth.*2 tensors of the encoder are missing: .*text\.trunk\.final_layer_norm"
    ):
        load_converted(fresh, irra(lacking), LoadReport("x.pth", "irra"))


def untouched(task: RetrievalTask, load: Callable[[], object], match: str) -> str:
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as caught:
        load()
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
    return str(caught.value)


def test_tensors_of_another_shape_are_a_table_and_nothing_is_loaded(
    model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    weights = golden_weights(model_golden)
    for name in [name for name in weights if "ln_1" in name]:
        weights[name] = torch.zeros(7)
    torch.save({"model": weights}, tmp_path / "x.pth")
    task = build_task(load_config(RECIPE, golden_overrides(model_golden)), num_pids=11)
    message = untouched(
        task,
        lambda: load_weights(task, tmp_path / "x.pth"),
        r"x\.pth \(format irra\): does not fit.*nothing was loaded",
    )
    assert "encoder.image.trunk.blocks.0.norm1.weight" in message
    assert "(7,)" in message and "(64,)" in message and "tensors have another shape" in message
    assert "missing" not in message


def test_a_grid_of_another_form_is_in_the_table(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    task = build_task(load_config(RECIPE, golden_overrides(model_golden)), None)
    torch.save(task.state_dict() | {"encoder.image.trunk.pos_embed": torch.zeros(64)}, tmp_path / "x.pth")
    message = untouched(task, lambda: load_weights(task, tmp_path / "x.pth"), "1 tensors have another shape")
    assert "encoder.image.trunk.pos_embed" in message and "(64,)" in message


KINDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "integer": (lambda value: value.to(torch.int8), r"\(integer, float in the model\)"),
    "complex": (lambda value: value.to(torch.complex64), r"\(complex, float in the model\)"),
    "not finite": (lambda value: value / 0, r"\(NaN or infinite\)"),
    "sparse": (lambda value: value.to_sparse(), r"\(sparse\)"),
    "meta": (lambda value: value.to("meta"), r"\(without values \(meta device\)\)"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["visual.conv1.weight", "visual.positional_embedding", "transformer.resblocks.0.ln_1.bias"]
)
def test_weights_of_another_kind_are_refused(
    name: str, kind: str, model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    weights, (change, message) = golden_weights(model_golden), KINDS[kind]
    weights[f"base_model.{name}"] = change(weights[f"base_model.{name}"])
    torch.save(weights, tmp_path / "x.pth")
    task = build_task(load_config(RECIPE, golden_overrides(model_golden)), None)
    untouched(task, lambda: load_weights(task, tmp_path / "x.pth"), rf"x\.pth: 1 tensors .*{message}; nothing was")


def test_a_deeper_model_is_refused_for_what_has_no_place(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch.save(golden_weights(model_golden), tmp_path / "x.pth")
    shallow = [*golden_overrides(model_golden), "model.text.options.num_hidden_layers=1"]
    task = build_task(load_config(RECIPE, shallow), num_pids=11)
    untouched(
        task,
        lambda: load_weights(task, tmp_path / "x.pth"),
        r"\d+ tensors of the encoder are unexpected: encoder\.text\.trunk\.encoder\.layers\.1",
    )


def test_the_wrong_format_is_refused(model_golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    torch.save(golden_weights(model_golden), tmp_path / "x.pth")
    task = build_task(load_config(RECIPE, golden_overrides(model_golden)), None)
    untouched(
        task, lambda: load_weights(task, tmp_path / "x.pth", format="huggingface"), "tensors of the encoder are missing"
    )
    odd = golden_weights(model_golden) | {"base_model.transformer.resblocks.0.attn.in_proj_bias": torch.zeros(2)}
    torch.save(odd, tmp_path / "odd.pth")
    untouched(task, lambda: load_weights(task, tmp_path / "odd.pth"), r"odd\.pth.* not of format irra")


def test_a_grid_that_is_not_square_cannot_be_resized_and_says_how_to_load_it(
    model_golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    torch.save(golden_weights(model_golden), tmp_path / "x.pth")
    task = build_task(load_config(RECIPE, [*golden_overrides(model_golden), "data.image_size=[64, 64]"]), None)
    untouched(
        task,
        lambda: load_weights(task, tmp_path / "x.pth"),
        r"pos_embed cannot be resized.*do not form a square.*set init\.image_size",
    )


# --- arbitrary content ------------------------------------------------------------------------------------------------


TENSORS = st.sampled_from([torch.zeros(2), torch.ones(3, 4, dtype=torch.float16), torch.tensor(7)])
PARTS = ["model", "state_dict", "visual.conv1.weight", "module.base_model.visual.proj", "logit_scale", "encoder.a"]
STATES = st.recursive(
    PLAIN | TENSORS, lambda inner: st.dictionaries(st.sampled_from(PARTS) | st.text(max_size=4), inner, max_size=4)
)


@pytest.fixture(scope="module")
def task(root: Path) -> torch.nn.Module:
    return build_task(config_of("irra", root), 8)


@FUZZ
@given(content=STATES | st.lists(STATES, max_size=2), format=st.sampled_from([None, *FORMATS]))
def test_anything_in_a_checkpoint_is_a_clear_error(content: Any, format: str | None, task, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pt")
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises((CheckpointError, ConfigError)) as error:  # weights are missing in any case
        load_weights(task, tmp_path / "odd.pt", format=format)
    assert "odd.pt" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
