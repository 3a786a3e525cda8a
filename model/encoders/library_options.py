"""Options that timm and transformers take, checked by the defaults of the libraries before they see them."""

from collections.abc import Mapping
from typing import Any

from utils.convert import fits, in_words, shown
from utils.errors import ConfigError
from utils.registry import did_you_mean

MOST, MOST_LAYERS = 1_000_000, 1_000  # of any size, and of layers, which take time one by one
LISTS = ("img_size", "patch_size")  # one number, or two
LAYERS = ("depth", "num_hidden_layers")


def check_library_options(options: Mapping[str, Any], defaults: Mapping[str, Any], path: str, hint: str = "") -> None:
    """Raise `ConfigError` for an option that a library lacks, of another type than its default, or of no possible size.

    Args:
        options: option -> value from YAML.
        defaults: option -> default of the library; None fits every value.
        path: dotted path of `options` in the config.
        hint: remark about unknown options, in parentheses.
    """
    for name, value in options.items():
        if name not in defaults:
            raise ConfigError(f"{path}.{name}: unknown key{hint}; {did_you_mean(str(name), defaults)}")
        default, kind = defaults[name], type(defaults[name])
        if kind not in (bool, int, float, str) or (value is None and name.endswith("_id")):
            continue
        for size in value if name in LISTS and isinstance(value, list) else [value]:
            if not fits(size, kind):
                raise ConfigError(f"{path}.{name}: must be {in_words(kind)}, got {shown(value)}")
            most = MOST_LAYERS if name in LAYERS else MOST
            if kind is int and default > 1 and not name.endswith("_id") and not 1 <= size <= most:
                raise ConfigError(f"{path}.{name}: must be from 1 to {most:,}, got {size}")
