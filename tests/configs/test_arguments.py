"""Command lines: one-line errors, and a pointer to `--set` for the habits of IRRA, yacs and Hydra."""

import argparse
import shlex
import subprocess
import sys

import pytest

from configs.arguments import BY_REMARK, FOREIGN, Parser, positive
from configs.schema import load_config
from processor.help import sections
from processor.resolve import resolve
from tests.helpers.configs import ROOT


def parser(name: str = "train.py") -> Parser:
    made = Parser(prog=name)
    action = made.add_mutually_exclusive_group(required=True)
    action.add_argument("--config")
    action.add_argument("--resume")
    made.add_argument("--set", nargs="+", action="extend", default=[])
    made.add_argument("--print-config", action="store_true")
    made.add_argument("--split", choices=["val", "test"])
    made.add_argument("--seeds", type=int, nargs="+")
    return made


def error_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(shlex.split(line))
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and not captured.out and captured.err.count("\n") == 1
    return captured.err.strip()


HABITS = {
    "--data.batch_size 8": "data.batch_size=8",
    "--data.batch_size=8": "data.batch_size=8",
    "data.batch_size=8": "data.batch_size=8",
    "DATA.BATCH_SIZE 8": "data.batch_size=8",
    "MODEL.NAME clip SOLVER.BASE_LR 1e-5": "model.name=clip solver.lr=1e-5",
    "--opts MODEL.NAME clip data.views=2": "model.name=clip data.views=2",
    "+data.views=2 ~losses.mlm": "data.views=2 losses.mlm=null",
    "--loss_names sdm+id": "losses.sdm={} losses.id={}",
    "--loss_names 'sdm+mlm+id' --MLM": "losses.sdm={} losses.mlm={} losses.id={}",
    "--batch_size 8": "data.batch_size=8",
    "--batch-size 8": "data.batch_size=8",
    "--batchsize 8": "data.batch_size=8",
    "--lr 1e-5": "solver.lr=1e-5",
    "--root_dir 'my data'": "'data.root=my data'",
    "--dataset_name CUHK-PEDES": "data.dataset=cuhk_pedes",
    "--output_dir logs": "train.output=logs",
    "--num_epoch 60": "train.epochs=60",
    "--img_aug": "data.image_aug=flip,pad_crop,erase",
    "--img_size 384 128": "data.image_size=384,128",
    "--pretrain_choice a.pth": "init.path=a.pth",
    "--temperature 0.05": "model.temperature=0.05",
    "--mlm_loss_weight 0.5 --cmt_depth 2": "losses.mlm.weight=0.5 losses.mlm.depth=2",
    "--optimizer AdamW --lrscheduler cosine": "solver.optimizer=adamw solver.schedule.name=cosine",
    "--losses.trl.margin 0.3": "losses.trl.margin=0.3",
    "--solver.schedule.name step": "solver.schedule.name=step",
    "--noise_drop": "data.noise_drop=true",
    "--views": "data.views=VALUE",
}


@pytest.mark.parametrize("line", HABITS)
def test_the_options_of_others_lead_to_set(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(f"--config c.yaml {line}", capsys)
    names, _, rest = message.removeprefix("error: ").partition(": not ")
    assert names.split(", ")[0] == shlex.split(line)[0].partition("=")[0]
    assert rest.endswith(f" of train.py; write --set {HABITS[line]}"), message
    if "VALUE" not in message:
        parser().parse_args(["--config", "c.yaml", "--set", *shlex.split(HABITS[line])])


MESSAGES = {
    "--batch_size 8": "--batch_size: not an option of train.py; write --set data.batch_size=8",
    "--batch_size 8 --foo": "--batch_size, --foo: not options of train.py; write --set data.batch_size=8",
    "--config_file c.yaml": "--config_file: not an option of train.py; write --config c.yaml",
    "configs/irra.yaml": "configs/irra.yaml: not an argument of train.py; write --config configs/irra.yaml",
    "--config c --print_config": "--print_config: not an option of train.py; write --print-config",
    "--config c --foo": "--foo: not an option of train.py; see --help",
    "--config c foo": "foo: not an argument of train.py; see --help",
    "--config c --pretrain_choice ViT-B/16": "--pretrain_choice: not an option of train.py; model.image.arch and "
    "model.text.arch name the towers",
    "--config c --set data.batch_size 8 solver.lr=3": "--set data.batch_size: must have the form key=value; write "
    "--set data.batch_size=8 solver.lr=3",
    "--config c --set data.batch_size = 8": "--set data.batch_size: must have the form key=value; write --set "
    "data.batch_size=8",
    "--config c --split x": "--split: must be one of val, test, got 'x'",
    "--config c --seeds 1 x": "--seeds: must be an integer, got 'x'",
    "--config": "--config: needs a value, got none",
    "--config c --resume r": "--resume: must not be given with --config",
    "--config c --print-config=1": "--print-config: takes no value, got '1'",
    "--config c --s 1": "--s: could be any of --set, --split, --seeds; write it out",
    "": "--config, --resume: one of these must be given; see --help",
}


@pytest.mark.parametrize("line", MESSAGES)
def test_a_wrong_command_line_is_one_plain_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(line, capsys) == f"error: {MESSAGES[line]}"


def test_right_command_lines_are_taken_as_they_are() -> None:
    taken = parser().parse_args(["--conf", "c", "--set", "a.b=-1", "c= 2", "--set", "d", "--seeds", "-3", "4"])
    assert (taken.config, taken.set, taken.seeds) == ("c", ["a.b=-1", "c= 2", "d"], [-3, 4])


def test_the_keys_of_the_pointers_exist() -> None:
    known = {row.path for section in sections() for row in section.rows} | {"solver.schedule.name"}
    assert set(FOREIGN.values()) - known == {"model.text.options.vocab_size"}
    assert not set(FOREIGN) & set(BY_REMARK)
    written = [shlex.split(HABITS[line]) for line in ("--loss_names sdm+id", "--img_aug", "--img_size 384 128")]
    for overrides in written:
        resolve(load_config(ROOT / "configs/irra.yaml", overrides))


def test_configs_and_command_lines_do_not_import_torch() -> None:
    """`--help` and misspelt options answer before the seconds that torch takes to import."""
    code = "import sys, configs.arguments, configs.schema, utils.config; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [name for name in ("torch", "timm", "transformers", "numpy") if f"'{name}'" in done.stdout]


def test_counts_begin_at_one() -> None:
    assert positive("3") == 3
    for text in ("0", "-2"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be at least 1, got"):
            positive(text)
    for text in ("1.5", "many", "9" * 5000):
        with pytest.raises(ValueError, match=r"int|integer"):  # argparse names the argument
            positive(text)
