"""Files that a config takes from the Hugging Face hub: all missing ones in one error, before anything is loaded."""

from configs.schema import Config
from datasets.text.merges import MERGES_FILE, MERGES_URL
from datasets.text.tokenizers import published_tokenizer
from model.encoders import ENCODERS
from model.encoders.published import image_weights, text_weights
from utils.config import component_options
from utils.errors import ConfigError
from utils.hub import Published, is_cached, names_repository, why_silent

VIT_B16 = (
    "https://openaipublic.azureedge.net/clip/models/"
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt"
)


def require_downloads(config: Config, *, weights: bool = True) -> None:
    """Raise `ConfigError` if files are missing and the hub cannot be asked for them.

    Args:
        config: the experiment.
        weights: the towers' pretrained weights are needed, unless `init.path` replaces them.
    """
    missing = missing_downloads(config, weights=weights)
    if missing and (reason := why_silent()):
        clip = ENCODERS.get(config.model["name"], "model.name").tokenizers[0] == "clip"
        raise ConfigError(_message(missing, reason, clip=clip))


def missing_downloads(config: Config, *, weights: bool = True) -> list[Published]:
    """Files that a config needs from the hub, and that the cache lacks."""
    needed: list[Published | None] = []
    if weights and config.init.path is None:
        options = component_options(ENCODERS, config.model, "model")
        image, text = options.get("image"), options.get("text")
        if image is not None and image.pretrained is True:
            needed.append(image_weights(image.arch))
        if text is not None and text.pretrained:
            needed.append(text_weights(text.arch))
    needed.append(published_tokenizer(config.data.tokenizer))
    return [one for one in needed if one is not None and names_repository(one.repo) and not is_cached(one)]


def _message(missing: list[Published], reason: str, *, clip: bool) -> str:
    keys = [one.key for one in missing]
    kinds = ["the weights"] * (keys != ["data.tokenizer"]) + ["the tokenizer"] * ("data.tokenizer" in keys)
    lines = [f"{', '.join(keys)}: cannot get {' and '.join(kinds)} from the hub or its cache ({reason}):"]
    for one in missing:
        files = ", ".join(group[0] for group in one.files)
        lines.append(f"  {one.key}: {one.what}, published at https://huggingface.co/{one.repo} ({files})")
    lines.append("With a network, these commands fetch them into the cache, which can be copied to this machine:")
    lines += [f"  hf download {repo}" for repo in dict.fromkeys(one.repo for one in missing)]
    return "\n".join([*lines, *_local_files(missing, clip=clip)])


def _local_files(missing: list[Published], *, clip: bool) -> list[str]:
    """Options that take local files in place of the missing ones."""
    keys = {one.key for one in missing}
    lines = ["Or set options that take local files:"]
    if clip and keys & {"model.image.arch", "model.text.arch"}:
        lines.append(f"  init.path=ViT-B-16.pt, for both towers of CLIP ViT-B/16: {VIT_B16}")
    if "model.image.arch" in keys:
        lines.append("  model.image.pretrained=FILE, timm's model.safetensors of the image tower")
    if "model.text.arch" in keys:
        lines.append("  model.text.arch=FOLDER, config.json and model.safetensors of the text tower")
    if "data.tokenizer" in keys and clip:
        lines.append(f"  data.tokenizer={MERGES_FILE}: {MERGES_URL}")
    elif "data.tokenizer" in keys:
        lines.append("  data.tokenizer=vocab.txt, the vocabulary of BERT, or a folder with its tokenizer.json")
    return [*lines, "To check the data alone, train configs/cuhk_small.yaml, which needs no download."]
