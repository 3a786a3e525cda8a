"""Pretrained weights of the towers on the Hugging Face hub, and the error without them."""

from timm.models import get_pretrained_cfg

from utils.errors import ConfigError
from utils.hub import WEIGHTS, Published

IMAGE_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def image_weights(arch: str) -> Published | None:
    """Weights of a timm model; None if timm knows no repository of this name."""
    try:
        published = get_pretrained_cfg(arch)
    except RuntimeError:  # unknown name
        return None
    if published is None or not published.hf_hub_id:
        return None
    files = (published.hf_hub_filename,) if published.hf_hub_filename else IMAGE_FILES
    return Published("model.image.arch", f"weights {arch}", published.hf_hub_id, (files,))


def text_weights(arch: str) -> Published:
    """Weights of a model of transformers."""
    return Published("model.text.arch", f"weights {arch}", arch, (WEIGHTS, ("config.json",)))


def text_config(arch: str) -> Published:
    """Sizes of a model of transformers."""
    return Published("model.text.arch", f"sizes of {arch}", arch, (("config.json",),))


def no_weights(tower: str, arch: str, error: Exception) -> ConfigError:
    """The error for pretrained weights that are neither cached nor available from the hub."""
    return ConfigError(
        f"model.{tower}.arch: cannot get the weights of {arch} from the hub or its cache ({reason(error)}); start from "
        f"a local checkpoint such as OpenAI's ViT-B-16.pt with init.path=FILE, or from random weights with "
        f"model.{tower}.pretrained=false"
    )


def reason(error: Exception) -> str:
    """The last line of a library's message, usually the cause."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
