"""Odd values for every option: a config that builds, or one plain line."""

import random
from collections.abc import Iterator

import pytest

from configs.schema import load_config
from processor import training
from processor.help import sections
from processor.resolve import resolve
from tests.helpers.configs import ROOT, TINY_IVT
from utils.errors import ConfigError

VALUES = [
    "null ",
    " [] ",
    " {} ",
    " [{a: 1}] ",
    " [[a]] ",
    " [null] ",
    " [3] ",
    " {a: 1} ",
    " {a: null} ",
    " {a: {b: [1]}} ",
    " [1, 2] ",
    " [a, b]\n    ",
    " true ",
    " 0 ",
    " -1 ",
    " 2.5 ",
    " 1e300 ",
    " 9223372036854775807 ",
    " 99999999999999999999999 ",
    " '' ",
    " x,y ",
    " '(' ",
    " [flip, {flip: null}]\n    ",
    " {name: null} ",
    " {name: [a]} ",
    " .nan ",
    " [.inf, 1] ",
    " {'': 1} ",
    " /proc ",
    " 1,2",
]
WHOLE = [
    "data",
    "model",
    "init",
    "teacher",
    "losses",
    "solver",
    "train",
    "eval",
    "solver.schedule",
    "solver.schedule.name",
    "solver.rules",
    "data.image_aug",
    "train.trackers",
    "losses.sdm",
    "model.name",
    "model.image",
    "model.image.options",
    "model.text.options",
    "model.image.options.depth",
    "model.image.options.patch_size",
    "model.text.options.vocab_size",
    "model.text.options.num_hidden_layers",
    "losses.x",
]
PLAIN = ("Error", "<class", "object", "NoneType", "unsupported operand", "expected int", "Optional")
SAMPLE = 200  # of about 7,000 pairs of option and value


def targets() -> Iterator[list[str]]:
    """Overrides that set one option, with `VALUE` in place of its value."""
    for key in WHOLE:
        yield [f"{key}=VALUE"]
    for section in sections():
        parent, _, name = section.key.rpartition(".")
        for path, *_ in section.rows:
            option = path.rpartition(".")[2]
            if parent in ("data.image_aug", "train.trackers"):
                yield [f"{parent}=[{{{name}: {{{option}: VALUE}}}}]"]
            elif section.key == "solver.rules":
                yield [f"solver.rules=[{{{option}: VALUE}}]"]
            elif parent == "solver.schedule":
                yield [f"solver.schedule={{name: {name}, warmup_epochs: null, warmup_factor: null}}", f"{path}=VALUE"]
            elif parent == "model" and name == "ivt":
                yield ["model={name: ivt, embed_dim: null}", "losses={mlm: null}", *TINY_IVT, f"{path}=VALUE"]
            else:
                yield [*([f"model.name={name}"] if parent == "model" else []), f"{path}=VALUE"]


def test_any_value_of_any_option_builds_or_is_one_plain_line() -> None:
    pairs = [(target, value.strip()) for target in targets() for value in VALUES]
    refused = 0
    for target, value in random.Random(3).sample(pairs, SAMPLE):
        overrides = [text.replace("VALUE", value) for text in target]
        try:
            training.check(resolve(load_config(ROOT / "configs/synthetic.yaml", overrides)))
        except ConfigError as error:
            refused += 1
            message = str(error)
            assert len(message) < 500 and (len(message.splitlines()) == 1 or message.startswith("teacher.")), overrides
            assert not [word for word in PLAIN if word in message], (overrides, message)
        except Exception as error:
            pytest.fail(f"{overrides}: {error!r}")
    assert refused > SAMPLE / 2


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.image.options.depth=x", r"model\.image\.options\.depth: must be an integer, got 'x'"),
        ("model.image.options.depth=0", r"model\.image\.options\.depth: must be from 1 to 1,000, got 0"),
        ("model.image.options.qkv_bias=3", r"model\.image\.options\.qkv_bias: must be true or false, got 3"),
        (
            "model.image.options.patch_size=[8, a]",
            r"model\.image\.options\.patch_size: must be an integer, got \[8, 'a'\]",
        ),
        (
            "model.text.options.num_hidden_layers=9223372036854775807",
            r"num_hidden_layers: must be from 1 to 1,000, got",
        ),
        ("model.text.options.hidden_act=[a]", r"model\.text\.options\.hidden_act: must be a text, got \['a'\]"),
        ("losses.mlm.depth=9223372036854775807", r"losses\.mlm\.depth: must be from 0 to 1,000, got"),
        ("model.embed_dim=9223372036854775807", r"model\.embed_dim: must be from 1 to 1,000,000, got"),
    ],
)
def test_options_of_libraries_are_checked_in_plain_words(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training.check(resolve(load_config(ROOT / "configs/synthetic.yaml", [override])))
