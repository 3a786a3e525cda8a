"""Command lines: an error is one line, and the options of other projects lead to `--set`."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from configs.schema import Config
from utils.convert import shortened
from utils.options import walk
from utils.registry import nearest

# argparse's messages, as regular expressions, and ours.
MESSAGES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (
        r"argument (.+): invalid choice: (.+) \(choose from (.+)\)",
        lambda found: f"{found[1]}: must be one of {found[3].replace(chr(39), '')}, got {found[2]}",
    ),
    (r"argument (.+): invalid int value: (.+)", r"\1: must be an integer, got \2"),
    (r"argument (.+): invalid float value: (.+)", r"\1: must be a number, got \2"),
    (r"argument (.+): expected (?:one|at least one) argument", r"\1: needs a value, got none"),
    (r"argument (.+): ignored explicit argument (.+)", r"\1: takes no value, got \2"),
    (r"argument (.+): not allowed with argument (.+)", r"\1: must not be given with \2"),
    (r"argument (.+)", r"\1"),
    (
        "one of the arguments (.+) is required",
        lambda found: f"{', '.join(found[1].split())}: one of these must be given; see --help",
    ),
    (r"the following arguments are required: (.+)", r"\1: must be given; see --help"),
    (r"ambiguous option: (\S+) could match (.+)", r"\1: could be any of \2; write it out"),
)
# Options of IRRA, RDE, FMFA and fast-reid whose names differ from those of our configs.
KEYS = {
    "data.root": "root_dir data_dir data_path data_root",
    "data.dataset": "dataset_name dataset_names names",
    "data.image_size": "img_size size_train size_test input_size",
    "data.batch_size": "ims_per_batch train_batch_size",
    "data.num_instances": "num_instance",
    "data.workers": "num_workers",
    "data.noise_rate": "noisy_rate",
    "data.noise_file": "noisy_file",
    "data.text_aug": "txt_aug",
    "eval.batch_size": "test_batch_size eval_batch_size",
    "eval.every": "eval_period",
    "eval.select_on": "val_dataset",
    "init.path": "finetune pretrain_path pretrained_path checkpoint weights",
    "losses.mlm.depth": "cmt_depth",
    "losses.tal.margin": "margin",
    "losses.tal.tau": "tau",
    "model.image.stride": "stride_size",
    "model.temperature": "temperature",
    "model.text.options.vocab_size": "vocab_size",
    "solver.lr": "base_lr learning_rate",
    "solver.schedule.name": "lrscheduler lr_scheduler scheduler",
    "solver.schedule.warmup_epochs": "warmup_epochs",
    "solver.schedule.warmup_factor": "warmup_factor",
    "solver.schedule.warmup": "warmup_method",
    "solver.schedule.milestones": "milestones",
    "solver.schedule.gamma": "gamma",
    "solver.schedule.power": "power",
    "solver.schedule.min_lr": "target_lr eta_min_lr",
    "train.accumulate": "accumulation_steps gradient_accumulation_steps",
    "train.epochs": "epoch num_epoch num_epochs max_epoch max_epochs",
    "train.log_every": "log_period",
    "train.output": "output_dir save_dir log_dir",
}
REMARKS = {
    "evaluate with python test.py": "test eval evaluate eval_only test_only",
    "solver.betas=0.9,0.999 sets both": "alpha beta",
    "solver.rules sets the rates and the decay of biases and heads": "lr_factor bias_lr_factor weight_decay_bias",
    "resume with --resume RUN, a run folder": "resume_ckpt_file",
    "start several processes with torchrun --nproc_per_node=N": "local_rank gpu gpus gpu_id num_gpus device",
    "the masking of captions is that of the publication": "masked_token_rate masked_token_unchanged_rate",
    "model.image.arch and model.text.arch name the towers": "pretrain_choice backbone",
}
CONFIGS = {"cfg", "cfg_file", "config_file", "config_path", "yaml"}
OPEN = ("model.", "losses.", "solver.schedule.")  # sections whose keys depend on a component
LOWER = ("data.dataset", "solver.optimizer", "solver.schedule.name")  # names that others capitalise
TYPES = {path: hint for path, _, hint in walk(Config)}
FOREIGN = {name: key for key, names in KEYS.items() for name in names.split()}
BY_NAME = {path.rpartition(".")[2]: path for path in reversed(TYPES)} | FOREIGN
BY_REMARK = {name: remark for remark, names in REMARKS.items() for name in names.split()}


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line each. Options it lacks are translated to `--set`, if the program takes that."""

    def error(self, message: str) -> NoReturn:
        for pattern, ours in MESSAGES:
            if re.fullmatch(pattern, message):
                message = re.sub(pattern, ours, message)
                break
        self.exit(2, f"error: {message}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        self._refuse(unknown_options(words, self._names()), "option")
        if not any(not action.option_strings for action in self._actions):  # before a missing option is said
            first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
            self._refuse(words_as_options(words[:first]), "argument")
        found, more = super().parse_known_args(words, namespace)
        self._refuse(words_as_options(more), "argument")
        self._check_set(getattr(found, "set", None) or [])
        return found, more

    def _check_set(self, given: list[str]) -> None:
        """End with an error for `--set key value` and `--set key = value`; load_config refuses other words."""
        if bad := [word for word in given if "=" not in word]:
            pairs = words_as_options([word for word in given if word != "="])
            if all(values and re.fullmatch(r"[\w.-]+", name) for name, values in pairs):
                overrides = [word for name, values in pairs for word in overrides_for(name, values)]
                self.error(f"--set {bad[0]}: must have the form key=value; write --set {joined(overrides)}")

    def _names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def _refuse(self, given: list[tuple[str, list[str]]], kind: str) -> None:
        """End with an error if there are words that the program does not take.

        Args:
            given: (name, its values).
            kind: word for them in the message.
        """
        if not given:
            return
        options, overrides, remarks = [], [], []
        for name, values in given:
            plain = name.lstrip("-+")
            spelt = plain.replace("-", "_").lower()
            near = nearest(plain, [own.lstrip("-") for own in self._names() if own.startswith("--")])
            if spelt in CONFIGS or plain.endswith((".yaml", ".yml")):
                options += [f"--config {values[0] if values else plain}"] if "--config" in self._names() else []
            elif "--set" in self._names() and (found := overrides_for(plain, values, certain=near is not None)):
                overrides += found
            elif "--set" in self._names() and (remark := BY_REMARK.get(spelt)):
                remarks += [] if remark in remarks else [remark]
            elif near and name.startswith("-"):
                options.append(f"--{near}")
        if overrides:
            options.append(f"--set {joined(overrides)}")
        names = ", ".join(dict.fromkeys(shortened(name) for name, _ in given))
        remedy = "; ".join([*([f"write {' '.join(options)}"] if options else []), *remarks]) or "see --help"
        self.error(f"{names}: not {f'{kind}s' if len(given) > 1 else f'an {kind}'} of {self.prog}; {remedy}")


def positive(text: str) -> int:
    """Parse an argument that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def unknown_options(words: Iterable[str], known: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(option, values) of the options of a command line that a program lacks."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for word in words:
        if word == "--":
            break
        if word.startswith("-") and not re.fullmatch(r"-[\d.e-]*", word):
            name, equals, value = word.partition("=")
            inside = not any(own.startswith(name) for own in known)
            found += [(name, [value] if equals else [])] if inside else []
            inside = inside and not equals
        elif inside:
            found[-1][1].append(word)
    return found


def words_as_options(words: list[str]) -> list[tuple[str, list[str]]]:
    """(name, values) of `key=value` words and of yacs's pairs `KEY value`."""
    found: list[tuple[str, list[str]]] = []
    waits = False
    for word in words:
        name, equals, value = word.partition("=")
        if waits and not equals:
            found[-1][1].append(word)
            waits = False
        else:
            found.append((name, [value] if equals else []))
            waits = not equals and not word.endswith((".yaml", ".yml"))
    return found


def overrides_for(name: str, values: list[str], *, certain: bool = False) -> list[str]:
    """Words for `--set` in place of another project's option, or of a key without `--set`; none if it is unknown.

    Args:
        name: option without hyphens in front.
        values: its values.
        certain: refuse a key that is only close to `name`.
    """
    plain = name.replace("-", "_").lower()
    last = plain.rpartition(".")[2]
    if plain in SPECIAL:
        return SPECIAL[plain](values)
    if plain in ("opts", "opt"):
        return [word for pair in words_as_options(values) for word in overrides_for(*pair)]
    if name.startswith("~"):  # Hydra's, to drop a loss
        return [f"{plain[1:]}=null"]
    if match := re.fullmatch(r"(\w+)_loss_weight", last):
        key: str | None = f"losses.{match[1]}.weight"
    elif plain in TYPES or (name == plain and plain.startswith(OPEN)):
        key = plain
    elif last in BY_REMARK:
        key = None
    else:
        key = FOREIGN.get(last) or (plain if plain.startswith(OPEN) else BY_NAME.get(last))
        if key is None and not certain:
            close = nearest(plain, TYPES if "." in plain else BY_NAME)
            key = BY_NAME.get(close, close) if close else None
    return [f"{key}={value_for(key, values)}"] if key else []


def value_for(key: str, values: list[str]) -> str:
    """The values of an option as one text after `key=`."""
    if not values:
        return "true" if TYPES.get(key) is bool else "VALUE"
    text = ",".join(values)
    return text.lower().replace("-", "_") if key in LOWER else text


def joined(overrides: Iterable[str]) -> str:
    """The words for `--set` as a shell takes them; `{}` needs no quotes."""
    quoted = {word: shlex.quote(word.removesuffix("{}")) for word in overrides}
    return " ".join(
        f"{text}{{}}" if word.endswith("{}") and text == word[:-2] else shlex.quote(word)
        for word, text in quoted.items()
    )


def _pretrained(values: list[str]) -> list[str]:
    return [f"init.path={value}" for value in values if re.search(r"\.(pth?|bin|safetensors|tar)$", value)]


SPECIAL: dict[str, Callable[[list[str]], list[str]]] = {
    "img_aug": lambda values: ["data.image_aug=flip,pad_crop,erase"],
    "mlm": lambda values: ["losses.mlm={}"],
    "loss_names": lambda values: [
        f"losses.{name.lower()}={{}}" for name in re.split(r"[+,\s]+", "+".join(values)) if name
    ],
    "pretrain_choice": _pretrained,
    "txt_aug": lambda values: ["data.text_aug=0.2"],
    "fp16": lambda values: ["train.precision=fp16"],
    "amp": lambda values: ["train.precision=fp16"],
}
