"""Training steps of the authors' code, from checkouts of their repositories.

| name | repository | folder |
|---|---|---|
| irra | anosorae/IRRA@cfc2378 | the checkout |
| rde | QinYang79/RDE | 2024-CVPR-RDE in it |
| ivt | TencentYoutuResearch/PersonRetrieval-IVT@f205788 | the checkout |

Weights are random, because pretrained ones take no other time. On a CPU their casts to fp16 do nothing, so their step
is fp32.
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import BertConfig

from configs.schema import Config
from utils.batch import Batch
from utils.distributed import default_device
from utils.errors import ConfigError

NUM_PIDS = 11_003  # of CUHK-PEDES
ROOT = Path(__file__).resolve().parents[2]
TheirLosses = Callable[[Batch], Tensor]
# Options of IRRA and RDE with the same defaults in both.
OPTIONS = {
    "pretrain_choice": "ViT-B/16", "temperature": 0.02, "img_size": (384, 128), "stride_size": 16, "text_length": 77,
    "vocab_size": 49408, "cmt_depth": 4, "lr_factor": 5.0, "optimizer": "Adam", "lr": 1e-5, "bias_lr_factor": 2.0,
    "momentum": 0.9, "weight_decay": 4e-5, "weight_decay_bias": 0.0, "alpha": 0.9, "beta": 0.999,
    "mlm_loss_weight": 1.0, "id_loss_weight": 1.0, "tau": 0.015, "margin": 0.1, "select_ratio": 0.3,
}  # fmt: skip
CLIP = {
    "embed_dim": 512, "vision_layers": 12, "vision_width": 768, "vision_patch_size": 16, "context_length": 77,
    "vocab_size": 49408, "transformer_width": 512, "transformer_heads": 8, "transformer_layers": 12,
}  # fmt: skip


class AuthorsStep:
    """A model of the authors with its optimizer.

    Args:
        name: irra, rde or ivt.
        folder: folder of their code, see the table above.
        config: our config of the method, for the image size and the stride.
    """

    def __init__(self, name: str, folder: str, config: Config) -> None:
        if name not in BUILDERS:
            raise ConfigError(f"--authors: unknown method {name}; choose from {', '.join(BUILDERS)}")
        if not Path(folder).is_dir():
            raise ConfigError(f"--authors: must be a folder, got {folder}; clone the repository of {name}")
        self.device = default_device()
        torch.manual_seed(0)
        with imported_from(folder) as load, contextlib.redirect_stdout(io.StringIO()):
            self.model, self.losses, self.optimizer = BUILDERS[name](load, config)
        self.model.to(self.device).train()

    def __call__(self, batch: Batch) -> float:
        """Forward, backward and update on a batch of ours; returns the loss."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                stack.enter_context(mock.patch.object(Tensor, "half", Tensor.float))
                stack.enter_context(mock.patch.object(Tensor, Tensor.cuda.__name__, lambda tensor: tensor))
            loss = self.losses(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item()


@contextlib.contextmanager
def imported_from(folder: str) -> Iterator[Callable[[str], ModuleType]]:
    """Import modules by name from a folder in place of ours of the same name, which are back afterwards."""
    names = {path.stem for path in Path(folder).iterdir()}
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}
    others = [path for path in sys.path if Path(path).resolve() != ROOT]  # folders without __init__.py come last
    importlib.invalidate_caches()
    try:
        with mock.patch.object(sys, "path", [folder, *others]):
            yield importlib.import_module
    except ImportError as error:
        raise ConfigError(f"--authors: {folder} cannot be imported ({error}); install what it needs") from None
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(ours)


def _of_clip(load: Callable[[str], ModuleType], config: Config, loss_names: str) -> tuple[Any, TheirLosses, Any]:
    build, clip, solver = load("model.build"), load("model.clip_model"), load("solver.build")

    def random_clip(name: str, image_size: tuple[int, int], stride: int) -> tuple[nn.Module, dict[str, Any]]:
        settings = CLIP | {"image_resolution": image_size, "stride_size": stride}
        return clip.CLIP(**settings), settings

    build.build_CLIP_from_openai_pretrained = random_clip  # type: ignore[attr-defined]
    options = SimpleNamespace(**OPTIONS | {"loss_names": loss_names, "img_size": config.data.image_size})
    model = build.build_model(options, num_classes=NUM_PIDS)
    model = model.float() if default_device().type == "cpu" else model

    def losses(batch: Batch) -> Tensor:
        found = model({**batch, "label_hat": torch.ones(len(batch["pids"]), device=batch["pids"].device)})
        total: Tensor = sum(value for key, value in found.items() if "loss" in key)
        return total

    return model, losses, solver.build_optimizer(options, model)


def irra(load: Callable[[str], ModuleType], config: Config) -> tuple[Any, TheirLosses, Any]:
    return _of_clip(load, config, "sdm+mlm+id")


def rde(load: Callable[[str], ModuleType], config: Config) -> tuple[Any, TheirLosses, Any]:
    return _of_clip(load, config, "TAL")


def ivt(load: Callable[[str], ModuleType], config: Config) -> tuple[Any, TheirLosses, Any]:
    """IVT's transformer and loss; the parameters of unused heads are left out."""
    make = load("model.backbones.vit_vl").vit_base_patch16_224_uvt_img_txt_mask
    stride = config.model["image"]["stride"]
    model = make(img_size=config.data.image_size, stride_size=stride, drop_path_rate=0.1, config=BertConfig())
    matching = load("loss.cmps_loss").Loss(NUM_PIDS, 768)

    def losses(batch: Batch) -> Tensor:
        words = batch["caption_ids"]
        image = model(batch["images"], mode="vis", use_mask=True, percent=0.2)[:, 0]
        text = model(words, (words != 0).long(), mode="txt", use_mask=True, percent=0.2)[:, 0]
        total: Tensor = matching(image, text, batch["pids"])
        return total

    return model, losses, torch.optim.SGD(model.parameters(), lr=5e-3, momentum=0.9, weight_decay=1e-4)


BUILDERS = {"irra": irra, "rde": rde, "ivt": ivt}
