"""IVT's encoder: the authors' tokens and gradients, where its weights come from, what masking leaves out."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import train as train_program
from configs.schema import load_config
from model.build import build_encoder, build_task, resolve
from model.checkpoints.formats import ivt, recognise
from model.encoders import Encoder
from model.encoders.ivt import IVTEncoder, keep_tokens
from model.encoders.towers import resize_position_grid
from model.load import LoadReport, load_converted, load_weights
from model.objectives.matching import cmpm_loss
from model.task import RetrievalTask
from solver.optimizer import parameter_settings
from tests.conftest import GOLDEN, ROOT, TINY_IVT
from tests.test_irra_model import close
from tests.test_transfer import evaluate
from utils.batch import Batch
from utils.errors import CheckpointError, ConfigError

CONFIG = ROOT / "configs/ivt.yaml"
SIZES = [
    "data.image_size=[32, 16]",
    "data.text_length=9",
    "model.image={arch: vit_base_patch16_224, stride: 8, pretrained: false, "
    "options: {embed_dim: 32, depth: 2, num_heads: 4, patch_size: 8}}",
    "model.text={arch: bert, pretrained: false, "
    "options: {vocab_size: 60, max_position_embeddings: 24, hidden_size: 32}}",
    "model.drop_path=0",
]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "ivt_encoder_stride8.npz"))


def named(golden: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """Tensors under the names that a checkpoint of the authors has."""
    return {
        f"encoder_vl.{name.removeprefix(prefix)}": torch.from_numpy(value)
        for name, value in golden.items()
        if name.startswith(prefix)
    }


@pytest.fixture
def task(golden: dict[str, np.ndarray]) -> RetrievalTask:
    task = build_task(resolve(load_config(CONFIG, SIZES)), num_pids=9).eval()
    report = load_converted(task, ivt(named(golden, "w/")), LoadReport("golden", "ivt"))
    assert not report.missing and not report.unexpected and not report.resized
    return task


def inputs(golden: dict[str, np.ndarray]) -> Batch:
    return {
        "images": torch.from_numpy(golden["in/img"]),
        "caption_ids": torch.from_numpy(golden["in/ids"]),
        "pids": torch.from_numpy(golden["train/labels"]),
    }


def embedded(encoder: IVTEncoder, batch: Batch) -> dict[str, Tensor]:
    """What goes into the first block, caught there."""
    caught = []
    hook = encoder.trunk.blocks[0].register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    encoder.encode_image(batch["images"])
    encoder.encode_text(batch["caption_ids"])
    hook.remove()
    return dict(zip(("vis", "txt"), caught, strict=True))


def test_both_modalities_give_the_authors_tokens(task: RetrievalTask, golden: dict[str, np.ndarray]) -> None:
    encoder, batch = task.encoder, inputs(golden)
    assert isinstance(encoder, IVTEncoder)
    outputs: list[Tensor] = []
    for block in encoder.trunk.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    image, text = encoder.encode_image(batch["images"]), encoder.encode_text(batch["caption_ids"])
    for output, name in zip(outputs, ("vis_block0", "vis_block1", "txt_block0", "txt_block1"), strict=True):
        close(output, golden[f"mid/{name}"])
    close(image.tokens, golden["out/vis"])
    close(image.embedding, golden["out/vis_emb"])
    close(text.tokens, golden["out/txt"])
    close(text.embedding, golden["out/txt_emb"])
    for modality, tokens in embedded(encoder, batch).items():
        close(tokens, golden[f"mid/{modality}_embed"])
    close(encoder.trunk.patch_embed(batch["images"]), golden["mid/vis_patch_tokens"])
    cosine = nn.functional.normalize(text.embedding) @ nn.functional.normalize(image.embedding).T
    close(cosine, golden["out/sim_t2i"])


def test_padding_is_kept_from_the_words(task: RetrievalTask, golden: dict[str, np.ndarray]) -> None:
    encoder, ids = task.encoder, inputs(golden)["caption_ids"]
    assert isinstance(encoder, IVTEncoder)
    close(encoder.run_blocks(encoder.words(input_ids=ids), None, text=True).tokens, golden["out/txt_without_mask"])
    short = ids[2:, :3]  # its other columns are padding
    close(encoder.encode_text(short).embedding, golden["out/txt_emb"][2:])


@pytest.mark.parametrize("modality", ["vis", "txt"])
def test_the_tokens_that_masking_keeps_give_the_authors_outputs(
    modality: str, task: RetrievalTask, golden: dict[str, np.ndarray]
) -> None:
    encoder = task.encoder
    assert isinstance(encoder, IVTEncoder)
    tokens = embedded(encoder, inputs(golden))[modality]
    mask = torch.from_numpy(golden["in/mask"]).bool() if modality == "txt" else None
    kept = torch.from_numpy(golden[f"bmm/{modality}_kept"])
    for positions in (kept[None], kept.repeat(len(tokens), 1)):  # shared by the batch, or one row for each
        encoded = encoder.run_blocks(*keep_tokens(tokens, mask, positions), text=modality == "txt")
        close(encoded.tokens, golden[f"bmm/{modality}_out"])


def test_loss_and_every_gradient_are_the_authors(task: RetrievalTask, golden: dict[str, np.ndarray]) -> None:
    total, terms = task(inputs(golden))
    np.testing.assert_allclose(float(terms["cmpm_loss"]), golden["train/loss"], rtol=1e-6)
    total.backward()
    expected = ivt(named(golden, "grad/"))
    parameters = dict(task.named_parameters())
    assert expected.keys() == parameters.keys() and len(parameters) == 44
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        close(parameter.grad, expected[name].numpy())


@pytest.mark.parametrize("suffix", ["", "_unique"])
@pytest.mark.parametrize("precision, tolerance", [("f32", 1e-6), ("f64", 1e-7)])
def test_cmpm_is_the_authors(suffix: str, precision: str, tolerance: float) -> None:
    golden = np.load(GOLDEN / "ivt_cmpm.npz")
    image, text = (torch.from_numpy(golden[f"{name}_{precision}"]).requires_grad_() for name in ("img", "txt"))
    loss = cmpm_loss(image, text, torch.from_numpy(golden[f"labels{suffix}"]))
    np.testing.assert_allclose(float(loss.detach()), golden[f"loss{suffix}_{precision}"], rtol=tolerance)
    loss.backward()
    for name, leaf in (("img", image), ("txt", text)):
        close(leaf.grad, golden[f"grad_{name}{suffix}_{precision}"], 1e-6 if precision == "f32" else 1e-7)  # type: ignore[arg-type]


def test_three_levels_are_one_matrix() -> None:
    golden = np.load(GOLDEN / "ivt_cmpm.npz")
    image, text, pids = (torch.from_numpy(golden[f"mla_{name}"]) for name in ("img_f64", "txt_f64", "labels"))
    assert float(cmpm_loss(image, text, pids)) == pytest.approx(float(golden["mla_loss_f64"]), rel=1e-7)
    order = torch.tensor([0, 2, 4, 1, 3, 5])  # pair by pair, as our batches are, not level by level
    torch.testing.assert_close(cmpm_loss(image[order], text[order], pids[order]), cmpm_loss(image, text, pids))


def test_a_target_that_sums_to_one_has_no_negative_loss() -> None:
    image, pids = torch.eye(4, dtype=torch.float64) * 60, torch.tensor([0, 0, 1, 1])
    image[1], image[3] = image[0], image[2]
    assert float(cmpm_loss(image, image, pids)) == pytest.approx(-np.log(2), abs=1e-6)  # twice -ln(2) / 2
    assert float(cmpm_loss(image, image, pids, target_norm="sum")) == pytest.approx(0, abs=1e-6)


def test_position_grids_are_resized_as_the_authors_do() -> None:
    golden = np.load(GOLDEN / "ivt_posembed.npz")
    source = torch.from_numpy(golden["src"])
    for grid in ((31, 10), (24, 8)):
        close(resize_position_grid(source, grid), golden[f"dst_{grid[0]}x{grid[1]}"], 0)


# --- masking --------------------------------------------------------------------------------------------------------


def token_counts(encoder: Encoder, steps: int, batch: int = 2, length: int = 20) -> dict[str, list[int]]:
    """Tokens that the first block gets, in each of some training steps."""
    assert isinstance(encoder, IVTEncoder)
    seen: list[int] = []
    encoder.train().trunk.blocks[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    images, ids = torch.zeros(batch, 3, *encoder.image_size), torch.ones(batch, length, dtype=torch.int64)
    for _ in range(steps):
        encoder.encode_image(images)
        encoder.encode_text(ids)
    return {"image": seen[::2], "text": seen[1::2]}


def tiny_ivt(*overrides: str) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(load_config(CONFIG, [*TINY_IVT, *overrides]))


def test_masking_removes_zero_to_a_fifth_of_the_tokens_and_their_work() -> None:
    counts = token_counts(tiny_ivt(), steps=150)
    patches = 1 + 4 * 2  # 64x32 in patches of 16
    assert set(counts["image"]) == {patches, patches - 1}
    assert set(counts["text"]) == {20, 19, 18, 17, 16}
    assert counts["image"].count(patches) == pytest.approx(75, abs=25)
    both = list(zip(counts["image"], counts["text"], strict=True))
    assert len(set(both)) == 10  # drawn independently


def test_without_masking_or_in_evaluation_all_tokens_are_there() -> None:
    assert set(token_counts(tiny_ivt("model.mask_ratio=0"), steps=20)["text"]) == {20}
    encoder = tiny_ivt("model.mask_ratio=0.9").eval()
    ids = torch.ones(2, 20, dtype=torch.int64)
    torch.testing.assert_close(encoder.encode_text(ids).tokens, encoder.encode_text(ids).tokens, rtol=0, atol=0)
    assert encoder.encode_text(ids).tokens.shape[1] == 20


@pytest.mark.parametrize("per_sample", [False, True])
def test_positions_are_shared_by_the_batch_or_drawn_for_each(per_sample: bool) -> None:
    encoder = tiny_ivt("model.mask_ratio=0.5", f"model.mask_per_sample={str(per_sample).lower()}")
    assert isinstance(encoder, IVTEncoder)
    for _ in range(20):
        kept = encoder._draw_kept(6, 40)
        assert kept.shape[0] == (6 if per_sample else 1) and 20 <= kept.shape[1] <= 40
        assert (kept[:, 0] == 0).all()  # the first token always stays, and stays the first
        for row in kept.tolist():
            assert len(set(row)) == len(row) and set(row) <= set(range(40))
        if per_sample and kept.shape[1] < 40:
            assert len({frozenset(row) for row in kept.tolist()}) > 1


def test_the_order_of_what_is_kept_does_not_matter(task: RetrievalTask, golden: dict[str, np.ndarray]) -> None:
    encoder, ids = task.encoder, inputs(golden)["caption_ids"]
    assert isinstance(encoder, IVTEncoder)
    words, mask = encoder.words(input_ids=ids), ids != 0
    first, second = (
        encoder.run_blocks(*keep_tokens(words, mask, torch.tensor([kept])), text=True).embedding
        for kept in ([0, 5, 1, 3], [0, 1, 3, 5])
    )
    torch.testing.assert_close(first, second)


# --- where the weights come from ------------------------------------------------------------------------------------

BERT = {"vocab_size": 90, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}


def sources(folder: Path, **bert: int) -> tuple[nn.Module, BertModel, list[str]]:
    """A timm vision transformer and a BERT in the libraries' own files, all random, and the options that name them."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", embed_dim=64, depth=2, num_heads=2)
    words = BertModel(BertConfig(**{**BERT, **bert}), add_pooling_layer=False)
    for parameter in (*vit.parameters(), *words.parameters()):
        nn.init.normal_(parameter)
    torch.save(vit.state_dict(), folder / "vit.pth")
    words.save_pretrained(folder / "bert")
    image = f"{{arch: vit_base_patch16_224, stride: 12, pretrained: {folder}/vit.pth"
    return (
        vit,
        words,
        [
            "data.image_size=[64, 32]",
            f"model.image={image}, options: {{embed_dim: 64, depth: 2, num_heads: 2}}}}",
            f"model.text={{arch: {folder}/bert, pretrained: true}}",
        ],
    )


def test_every_weight_is_the_one_of_its_source(tmp_path: Path) -> None:
    vit, bert, options = sources(tmp_path)
    encoder = build_encoder(load_config(CONFIG, options))
    own, image, text = encoder.state_dict(), vit.state_dict(), bert.state_dict()
    expected: dict[str, Tensor] = {}
    for name, value in image.items():
        if not name.startswith("head."):
            expected[f"trunk.{name}"] = value
    expected["trunk.pos_embed"] = resize_position_grid(image["pos_embed"], (5, 2))  # (64 - 16) // 12 + 1, ...
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"):
        for kind in ("weight", "bias"):
            if f"embeddings.{name}.{kind}" in text:
                expected[f"words.{name}.{kind}"] = text[f"embeddings.{name}.{kind}"]
    for block in range(2):
        for mlp, dense in (("fc1", "intermediate.dense"), ("fc2", "output.dense")):
            for kind in ("weight", "bias"):
                theirs = text[f"encoder.layer.{block}.{dense}.{kind}"]
                expected[f"trunk.blocks.{block}.text_mlp.{mlp}.{kind}"] = theirs
    assert own.keys() - expected.keys() == {"type_embed"}  # has no source: normal, std 0.02
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, msg=name)
    assert float(own["type_embed"].std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    "bert, message",
    [
        ({"hidden_size": 32}, r"model\.text: .* has 32 dimensions, the vision transformer 64"),
        ({"num_hidden_layers": 1}, r"model\.text\.arch: .* has 1 layers of 256 .* the vision transformer 2 of 256"),
        ({"intermediate_size": 128}, r"model\.text\.arch: .* layers of 128 hidden units"),
        ({"max_position_embeddings": 50}, r"data\.text_length: 100 tokens, but the embeddings have 50 positions"),
    ],
)
def test_a_bert_that_does_not_fit_is_named(bert: dict[str, int], message: str, tmp_path: Path) -> None:
    _, _, options = sources(tmp_path, **bert)
    with pytest.raises(ConfigError, match=message):
        build_encoder(load_config(CONFIG, options))


def test_a_folder_that_is_no_bert_is_refused(tmp_path: Path) -> None:
    _, _, options = sources(tmp_path)
    file = tmp_path / "bert/model.safetensors"
    state = load_file(file)
    save_file(
        {name: value for name, value in state.items() if "layer.1.output.dense" not in name}, file, {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"model\.text\.arch: .*bert is no BERT: 2 of its tensors are missing"):
        build_encoder(load_config(CONFIG, options))


def test_without_the_hub_the_missing_weights_are_named() -> None:
    small = "model.image={arch: vit_base_patch16_224, pretrained: false, options: {depth: 1}}"
    words = "model.text={arch: bert, pretrained: false}"
    with pytest.raises(ConfigError, match=r"model\.image\.arch: the weights of vit_base_patch16_224\.orig_in21k"):
        build_encoder(load_config(CONFIG, [words]))
    with pytest.raises(ConfigError, match=r"model\.text\.arch: the weights of google-bert/bert-base-uncased"):
        build_encoder(load_config(CONFIG, [small]))
    build_encoder(load_config(CONFIG, [small]), pretrained=False)  # as test.py builds it


MISTAKES = {
    "model.mask_ratio=1": r"model\.mask_ratio: must be at least 0 and below 1, is 1",
    "model.drop_path=-0.1": r"model\.drop_path: must be at least 0",
    "model.temperature=0": r"model\.temperature: must be above 0",
    "model.embed_dim=64": r"model\.embed_dim: unknown key",
    "model.text.options.hiden_size=2": r"model\.text\.options\.hiden_size: unknown key; did you mean 'hidden_size'",
    "model.text.options.vocab_size=abc": r"model\.text\.options: transformers cannot build",
    "model.text.options.vocab_size=0": r"model\.text\.options: transformers cannot build",
    "model.text.options.type_vocab_size=-1": r"model\.text\.options: transformers cannot build",
    "model.text.arch=brt": r"model\.text\.arch: unknown 'brt'",
    "model.image.arch=vit_base_patch16_siglip_224": r"model\.image\.arch: .* has no class token",
    "losses.mlm={}": r"losses\.mlm: needs all tokens; model\.mask_ratio=0 keeps them",
    "losses.efa={}": r"losses\.efa: needs all tokens; model\.mask_ratio=0 keeps them",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_name_their_path(override: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[override]):
        build_task(resolve(load_config(CONFIG, [*TINY_IVT, override])), num_pids=3)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def checkpoint_keys() -> dict[str, dict[str, list[int]]]:
    keys = json.loads((GOLDEN / "ivt_checkpoint_keys.json").read_text())
    return {name: dict(value) for name, value in keys.items() if isinstance(value, dict | list)}


UNUSED = ("temp", "classifier_img.", "bottleneck_img.", "encoder_fusion.", "itm.")  # not read by the authors' retrieval


@pytest.mark.parametrize(
    "file, config",
    [
        ("finetune_cuhk_pedes_stride12_classes11003", "ivt.yaml"),
        ("finetune_rstpreid_stride16_classes3701", "ivt_rstpreid.yaml"),
        ("pretrain_stride16", "ivt_rstpreid.yaml"),
    ],
)
def test_every_published_tensor_has_a_place_or_a_reason(file: str, config: str) -> None:
    shapes = checkpoint_keys()[file]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert recognise(state) == "ivt"
    with torch.device("meta"):
        task = build_task(load_config(ROOT / "configs" / config), num_pids=9, pretrained=False)
    own = {name: value.shape for name, value in task.state_dict().items()}
    converted = ivt(state)
    placed = {name: value.shape for name, value in converted.items() if name in own}
    assert placed == own and len(own) == 204
    rest = converted.keys() - own.keys()
    assert all(name.startswith(UNUSED) for name in rest)
    counters = [name for name in state if name.endswith("position_ids")]
    assert len(state) == len(own) + len(rest) + len(counters)


def test_a_checkpoint_of_another_stride_is_resized_and_says_so(
    task: RetrievalTask, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    state = {f"module.{name}": value for name, value in named(golden, "w/").items()}
    state |= {"module.temp": torch.ones(()), "module.classifier_img.weight": torch.ones(4, 32)}
    torch.save({"state_dict": state, "epoch": 3, "best_acc": 0.5}, tmp_path / "checkpoint_best.pth")
    same = build_task(load_config(CONFIG, SIZES), num_pids=2)
    report = load_weights(same, tmp_path / "checkpoint_best.pth")
    assert report.format == "ivt" and not report.resized and not report.missing
    assert sorted(report.unexpected) == ["classifier_img.weight", "temp"]
    close(same.eval().encode_image(inputs(golden)["images"]).embedding, golden["out/vis_emb"])
    finer = build_task(load_config(CONFIG, [*SIZES, "model.image.stride=4"]), num_pids=2)
    report = load_weights(finer, tmp_path / "checkpoint_best.pth")
    assert sorted(report.resized) == ["encoder.trunk.pos_embed", "encoder.type_embed"]
    for ours, theirs in (("trunk.pos_embed", "pos_embed"), ("type_embed", "type_embed")):
        expected = resize_position_grid(torch.from_numpy(golden[f"w/{theirs}"]), (7, 3), source=(4, 2))
        close(finer.encoder.state_dict()[ours], expected.numpy(), 0)
    wider = [*SIZES[1:], "data.image_size=[40, 24]"]
    with pytest.raises(CheckpointError, match=r"pos_embed cannot be resized .* no square grid"):
        load_weights(build_task(load_config(CONFIG, wider), 2), tmp_path / "checkpoint_best.pth")


def test_the_full_size_encoder_has_the_authors_number_of_parameters() -> None:
    for stride, expected in ((12, 166_631_424), (16, 166_450_176)):
        with torch.device("meta"):
            task = build_task(load_config(CONFIG, [f"model.image.stride={stride}"]), num_pids=9, pretrained=False)
        assert sum(parameter.numel() for parameter in task.parameters()) == expected
    depths = [getattr(block.drop_path1, "drop_prob", 0.0) for block in task.encoder.trunk.blocks]
    np.testing.assert_allclose(depths, [0.1 * i / 11 for i in range(12)], atol=1e-7)
    assert {block.mlp is not block.text_mlp for block in task.encoder.trunk.blocks} == {True}
    assert task.encoder.words.LayerNorm.eps == 1e-12 and task.encoder.trunk.norm.eps == 1e-6
    assert task.encoder.words.dropout.p == 0.1


def test_the_published_settings() -> None:
    cuhk, icfg, rstp = (load_config(ROOT / "configs" / f"ivt{name}.yaml") for name in ("", "_icfg", "_rstpreid"))
    assert [config.data.dataset for config in (cuhk, icfg, rstp)] == ["cuhk_pedes", "icfg_pedes", "rstpreid"]
    assert [config.data.batch_size for config in (cuhk, icfg, rstp)] == [28, 28, 48]
    assert [config.model["image"]["stride"] for config in (cuhk, icfg, rstp)] == [12, 12, 16]
    for config in (cuhk, icfg, rstp):
        data, solver = config.data, config.solver
        assert (data.image_size, data.image_mean, data.image_std) == ((384, 128), (0.5,) * 3, (0.5,) * 3)
        assert set(data.image_aug) == {"pad_crop", "flip", "erase_noise"} and data.train_resize == "bicubic"
        assert (data.sampler, data.num_instances, data.views) == ("identity", 4, 3)
        assert data.text_levels == ["word", "phrase", "sentence"] and list(config.losses) == ["cmpm"]
        assert (solver.optimizer, solver.momentum, solver.lr, solver.weight_decay) == ("sgd", 0.9, 5e-3, 1e-4)
        assert parameter_settings("a.bias", solver.rules, solver.weight_decay) == (2, 1e-4)
        assert config.model["mask_ratio"] == 0.2 and config.model["drop_path"] == 0.1 and config.train.epochs == 120


# --- with the rest of the framework ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.views=1", "data.text_levels=[sentence]"],
        ["model.mask_ratio=0"],
        ["losses.cmpm=null", "losses.sdm={}"],
        ["losses.cmpm.target_norm=sum", "losses.id={}"],
        ["data.sampler=random", "model.mask_per_sample=true"],
        ["losses.cmpm=null", "losses.mlm={depth: 1}", "model.mask_ratio=0"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_ivt_trains_and_is_tested_like_any_other(overrides: list[str], root: Path, tmp_path: Path) -> None:
    config = resolve(load_config(CONFIG, [*TINY_IVT, f"data.root={root}", *overrides]))
    run = train_program.train(config, tmp_path / "run")
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(record["loss"]) and set(record["test"]) == {"R1", "R5", "R10", "mAP", "mINP"}
    rows = evaluate("--run", run, "--on", "synthetic", "--i2t")
    assert rows["t2i synthetic"] == record["test"]


def test_the_log_counts_pairs_and_not_views(root: Path, tmp_path: Path) -> None:
    config = resolve(load_config(CONFIG, [*TINY_IVT, f"data.root={root}"]))
    loader_pairs = 8 * 2 * 2
    run = train_program.train(config, tmp_path / "run")
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["samples_per_second"] * record["seconds"] == pytest.approx(loader_pairs, abs=8)
