"""IVT against its authors' code: tokens, loss, gradients, checkpoints, published settings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.schema import load_config
from model.build import build_task
from model.checkpoints.formats import ivt
from model.checkpoints.grids import resize_position_grid
from model.encoders.ivt import IVTEncoder, keep_tokens
from model.load import LoadReport, load_converted, load_weights
from model.task import RetrievalTask
from processor.resolve import resolve
from solver.optimizer import parameter_settings
from tests.helpers.configs import GOLDEN, ROOT
from tests.helpers.golden import close
from utils.batch import Batch
from utils.errors import CheckpointError

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
    """Tensors with the names of the authors' checkpoints."""
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
    """Inputs of the first block."""
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
    close(encoder(encoder.words(input_ids=ids), None, text=True).tokens, golden["out/txt_without_mask"])
    short = ids[2:, :3]  # the other columns are padding
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
    for positions in (kept[None], kept.repeat(len(tokens), 1)):  # shared by the batch, or one row per sample
        encoded = encoder(*keep_tokens(tokens, mask, positions), text=modality == "txt")
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


# --- masking ----------------------------------------------------------------------------------------------------------


def test_the_order_of_what_is_kept_does_not_matter(task: RetrievalTask, golden: dict[str, np.ndarray]) -> None:
    encoder, ids = task.encoder, inputs(golden)["caption_ids"]
    assert isinstance(encoder, IVTEncoder)
    words, mask = encoder.words(input_ids=ids), ids != 0
    first, second = (
        encoder(*keep_tokens(words, mask, torch.tensor([kept])), text=True).embedding
        for kept in ([0, 5, 1, 3], [0, 1, 3, 5])
    )
    torch.testing.assert_close(first, second)


# --- checkpoints ------------------------------------------------------------------------------------------------------


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
    with pytest.raises(CheckpointError, match=r"pos_embed cannot be resized .* do not form a square"):
        load_weights(build_task(load_config(CONFIG, wider), 2), tmp_path / "checkpoint_best.pth")


def test_the_full_size_encoder_has_the_authors_number_of_parameters() -> None:
    for stride, expected in ((12, 166_631_424), (16, 166_450_176)):
        with torch.device("meta"):
            task = build_task(load_config(CONFIG, [f"model.image.stride={stride}"]), num_pids=9, weights=False)
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
