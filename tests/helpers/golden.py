"""Golden vectors (tests/golden/README.md): readers, the models they belong to, and comparisons with them."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.schema import load_config
from model.build import build_task
from model.checkpoints.formats import IRRA_RULES, irra, renamed
from model.load import LoadReport, load_converted
from model.task import RetrievalTask
from tests.helpers.configs import ARCH, GOLDEN
from utils.batch import Batch

# The golden trajectory uses this recipe with a base learning rate of 1e-4.
RECIPE = "configs/irra.yaml"


def golden_overrides(golden: dict[str, np.ndarray]) -> list[str]:
    """Overrides that give the shipped recipe the size of the golden model."""
    size = json.loads(str(golden["cfg_json"]))
    image = (
        f"{{embed_dim: {size['vwidth']}, depth: {size['vlayers']}, "
        f"num_heads: {size['vwidth'] // 64}, patch_size: {size['patch']}}}"
    )
    text = (
        f"{{hidden_size: {size['twidth']}, num_hidden_layers: {size['tlayers']}, vocab_size: {size['vocab']}, "
        f"num_attention_heads: {size['twidth'] // 64}, intermediate_size: {4 * size['twidth']}, "
        f"max_position_embeddings: {size['ctx']}}}"
    )
    return [
        f"data.image_size={size['img']}",
        f"data.text_length={size['ctx']}",
        f"model.embed_dim={size['embed_dim']}",
        f"model.temperature={size['temp']}",
        f"model.image={{arch: {ARCH}, stride: {size['stride']}, pretrained: false, options: {image}}}",
        f"model.text={{arch: clip, pretrained: false, options: {text}}}",
        f"losses.mlm.depth={size['cmt']}",
        "losses.mlm.clean_captions=true",  # the golden batch has clean and masked captions
        f"losses.id.weight={size['id_w']}",
        f"losses.mlm.weight={size['mlm_w']}",
        "solver.lr=1e-4",
    ]


def golden_weights(golden: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """State dict of the golden model, with its authors' names."""
    return {name[2:]: torch.from_numpy(value) for name, value in golden.items() if name.startswith("w/")}


def golden_task(golden: dict[str, np.ndarray], *overrides: str, recipe: str | Path = RECIPE) -> RetrievalTask:
    """Task with the golden weights."""
    config = load_config(recipe, [*golden_overrides(golden), *overrides])
    task = build_task(config, num_pids=json.loads(str(golden["cfg_json"]))["nc"], weights=False)
    report = load_converted(task, irra(golden_weights(golden)), LoadReport("golden", "irra"))
    assert set(report.missing) <= {name for name in task.state_dict() if name.startswith("objectives")}
    return task


def golden_batch(golden: dict[str, np.ndarray]) -> Batch:
    """Batch that belongs to the golden outputs."""
    batch = {
        name: torch.from_numpy(golden[f"in/{name}"])
        for name in ("images", "caption_ids", "mlm_ids", "mlm_labels", "pids")
    }
    return batch | {"mlm_positions": batch["mlm_labels"].flatten().nonzero().squeeze(1)}


def golden_case(file: str) -> dict[str, np.ndarray]:
    """Arrays of a golden file, without the prefix of its only case."""
    stored = np.load(GOLDEN / file)
    return {name.removeprefix("case0/"): stored[name] for name in stored.files}


def fmfa_case(irra_golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs and values of FMFA's losses, from the authors' code and from the equations of the paper."""
    paper = dict(np.load(GOLDEN / "fmfa_paper_derived.npz"))
    values = irra_golden | paper
    return {name.removeprefix("case0/"): value for name, value in values.items() if name.startswith("case0/")}


def leaf(array: np.ndarray) -> Tensor:
    """Copy of an array as a tensor that requires a gradient."""
    return torch.from_numpy(array).clone().requires_grad_()


def assert_gradient(actual: Tensor | None, expected: np.ndarray) -> None:
    """Assert closeness to a golden gradient, relative to its largest value."""
    assert actual is not None
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


def close(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Assert elementwise closeness to a golden array."""
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance)


def features_are_the_authors(task: RetrievalTask, golden: dict[str, np.ndarray]) -> None:
    """Assert that tokens and embeddings of both towers match the golden ones."""
    batch = golden_batch(golden)
    image, text = task.encode_image(batch["images"]), task.encode_text(batch["caption_ids"])
    close(image.tokens, golden["out/image_feats"])
    close(image.embedding, golden["out/encode_image"])
    close(text.tokens, golden["out/text_feats"])
    close(text.embedding, golden["out/encode_text"])


def gradients_are_the_authors(task: RetrievalTask, golden: dict[str, np.ndarray], version: str) -> int:
    """Compare all gradient norms and the fully stored gradients; return the number of the latter."""
    gradients = {name: parameter.grad for name, parameter in task.named_parameters()}
    norms = json.loads(str(golden[f"{version}/grad_norms_json"]))
    assert len(norms) == len([name for name in golden if name.startswith("w/")])
    for name, norm in norms.items():
        parts = [gradients[ours] for ours in renamed(name, IRRA_RULES)]
        ours = torch.stack([part.norm() for part in parts if part is not None]).norm()
        np.testing.assert_allclose(float(ours), norm, rtol=2e-4, atol=1e-6, err_msg=name)
    whole = {n: torch.from_numpy(golden[f"{version}_grad/{n}"]) for n in norms if f"{version}_grad/{n}" in golden}
    for name, expected in irra(whole).items():
        actual = gradients[name]
        assert actual is not None
        close(actual, expected.numpy(), 2e-5 * float(expected.abs().max()))
    return len(whole)
