"""train.py from the command line: exit status, one-line errors, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import test as test_program
import train as train_program
from configs.schema import load_config
from datasets.annotations import load_annotations
from processor import training
from processor.resolve import resolve
from tests.helpers.configs import ROOT, TINY, irra_config, write_yaml
from tests.helpers.programs import run_program
from tools import ablate, teacher_readout
from utils.errors import ConfigError, DataError


def test_a_misspelt_key_ends_a_real_process_with_one_line() -> None:
    command = [sys.executable, "train.py", "--config", "configs/irra.yaml", "--set", "losses.mlm.dept=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 1
    assert done.stderr.strip() == "error: losses.mlm.dept: unknown key; did you mean 'depth'?"


def test_print_config_is_complete_and_reads_back(monkeypatch, capsys, tmp_path: Path) -> None:
    arguments = ["--set", "model.image.pretrained=false", "model.text.pretrained=false", "--print-config"]
    status, out, _ = run_program(
        train_program.main, monkeypatch, capsys, "--config", ROOT / "configs/irra.yaml", *arguments
    )
    assert status == 0
    printed = yaml.safe_load(out)
    assert printed["losses"]["mlm"] == {"weight": 1.0, "depth": 4, "clean_captions": False}
    (tmp_path / "printed.yaml").write_text(out)
    again = run_program(
        train_program.main, monkeypatch, capsys, "--config", tmp_path / "printed.yaml", "--print-config"
    )
    assert again[:2] == (0, out)


TRAIN_MISTAKES = {
    "augmentation": (["data.image_aug=[flop]", "--print-config"], "error: data.image_aug: unknown augmentation 'flop'"),
    "level": (["data.text_levels=[wrd]", "--print-config"], "data.text_levels: unknown 'wrd'; did you mean 'word'"),
    "no level": (["data.text_levels=[]", "--print-config"], "data.text_levels: needs at least one of word, phrase"),
    "identities": (
        ["data.sampler=identity", "data.batch_size=40"],
        "error: data.batch_size: a batch of 40 needs 10 identities with 4 pairs each, got 8",
    ),
    "data set": (["data.dataset=cuhk", "--print-config"], "error: data.dataset: unknown data set 'cuhk'"),
    "no config": (["--config", "nowhere.yaml"], r"error: nowhere.yaml (relative to the working directory"),
    "model option": (["model.image.options.depht=3", "--print-config"], "error: model.image.options.depht: "),
    "no data": (
        ["data.dataset=cuhk_pedes", "data.root=/nowhere"],
        "error: /nowhere/CUHK-PEDES: no such data set folder",
    ),
    "tokenizer": (["data.tokenizer=/nowhere"], "error: data.tokenizer: no tokenizer '/nowhere' found"),
    "weights": (
        ["model.text={arch: openai/clip-vit-base-patch16, pretrained: true}"],
        "error: model.text.arch: cannot get the weights from the hub or its cache",
    ),
    "image weights": (
        ["model.image={arch: vit_base_patch16_clip_quickgelu_224.openai, pretrained: true}"],
        "error: model.image.arch: cannot get the weights from the hub or its cache",
    ),
    "rule": (["solver.rules=[{match: '('}]"], "error: solver.rules[0].match: must be a regular expression, got '('"),
    "root": (["data.root=/proc"], "/proc: cannot render the synthetic data set there"),
    "no root": (["data.root=nope"], "nope (relative to the working directory"),
    "output": (["train.output=/proc/nowhere"], "cannot create the run folder"),
}


@pytest.mark.parametrize("case", TRAIN_MISTAKES)
def test_train_mistakes_exit_with_one_line(case: str, tiny: list[str], monkeypatch, capsys) -> None:
    arguments, message = TRAIN_MISTAKES[case]
    start = [] if arguments[0] == "--config" else ["--config", str(ROOT / "configs/irra.yaml"), "--set", *tiny]
    status, _, error = run_program(train_program.main, monkeypatch, capsys, *start, *arguments)
    assert status == 1
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in error


def test_a_config_of_a_bigger_machine_trains_and_evaluates(
    tiny: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    start = ["--config", ROOT / "configs/baseline.yaml", "--run", tmp_path / "run", "--set", *tiny]
    note = "INFO: data.workers: 1 in place of 4096, one per core of this machine"
    for program, arguments in (
        (train_program, [*start, "data.workers=4096"]),
        (test_program, ["--run", tmp_path / "run"]),
    ):
        status, out, error = run_program(program.main, monkeypatch, capsys, *arguments)
        assert status == 0 and out.count(note) == 1, error
    assert "workers: 4096" in (tmp_path / "run/config.yaml").read_text()


def test_home_folders_are_expanded_everywhere(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_yaml(tmp_path, "base.yaml", f"base: {ROOT}/configs/synthetic.yaml")
    write_yaml(tmp_path, "a.yaml", "base: $HOME/base.yaml\ninit: {path: ~/a.pt}\nteacher: {checkpoint: $HOME/t.pt}")
    set_paths = ["--set", "data.root=~/data", "train.output=${HOME}/runs"]
    print_config = ["--config", "~/a.yaml", "--print-config", *set_paths]
    _, out, error = run_program(train_program.main, monkeypatch, capsys, *print_config)
    assert not error
    for key, name in (("root", "data"), ("output", "runs"), ("path", "a.pt"), ("checkpoint", "t.pt")):
        assert f" {key}: {tmp_path}/{name}\n" in out
    for program, option in ((train_program, "--resume"), (test_program, "--run")):
        _, _, error = run_program(program.main, monkeypatch, capsys, option, "~/none")
        assert f"error: {tmp_path}/none: not a run folder" in error


def test_no_path_of_a_command_line_is_taken_unexpanded() -> None:
    sources = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
    assert not [source for source in sources if "type=Path" in source.read_text()]


def test_fine_tuning_without_the_weights_says_which(tiny: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = ["--config", ROOT / "configs/fmfa_finetune.yaml", "--set", *tiny]
    status, _, error = run_program(train_program.main, monkeypatch, capsys, *arguments)
    assert status == 1 and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: ham.pth (relative to the working directory")


def test_selecting_on_a_val_split_that_is_not_there_is_an_error(
    tiny: list[str], root: Path, monkeypatch, tmp_path
) -> None:
    annotations = load_annotations("synthetic", root)
    annotations.val.clear()
    monkeypatch.setattr(training, "load_annotations", lambda *args, **options: annotations)
    with pytest.raises(DataError, match=r"has no val split to select on; set data\.val_ids=200.*eval\.select_on=test"):
        training.train(irra_config(tiny), tmp_path / "run")
    run = training.train(irra_config(tiny, "eval.select_on=test"), tmp_path / "run")
    assert "best on test (best.pt)" in (run / "train.log").read_text()


def test_a_vocabulary_larger_than_the_text_towers_is_an_error(tiny: list[str], tmp_path: Path) -> None:
    message = r"data\.tokenizer: the text tower has 520 tokens .*, got a tokenizer with \d+"
    with pytest.raises(ConfigError, match=message):
        training.train(irra_config(tiny, "model.text.options.vocab_size=520"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_left_alone(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"run: run folder exists already"):
        training.train(irra_config(tiny), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = resolve(load_config(ROOT / "configs/baseline.yaml", [*TINY, f"data.root={root}"]))
    return training.train(config, tmp_path_factory.mktemp("cli") / "run")


def test_an_existing_run_folder_is_refused(finished: Path, tiny: list[str], monkeypatch, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    arguments = ["--config", ROOT / "configs/baseline.yaml", "--run", finished, "--set", *tiny]
    status, _, error = run_program(train_program.main, monkeypatch, capsys, *arguments)
    assert status == 1 and f"error: {finished}: run folder exists already" in error
    assert before == {path: path.stat().st_mtime_ns for path in finished.iterdir()}


def test_interrupting_leaves_no_traceback(tiny: list[str], monkeypatch, capsys) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    arguments = ["--config", ROOT / "configs/irra.yaml", "--set", *tiny]
    assert run_program(train_program.main, monkeypatch, capsys, *arguments)[0] == 130


def test_the_options_of_irra_lead_to_set_in_every_program(monkeypatch, capsys) -> None:
    for main in (train_program.main, test_program.main, ablate.main, teacher_readout.main):
        status, out, error = run_program(main, monkeypatch, capsys, "--batch_size", "8")
        assert status == 2 and not out
        assert error == "error: --batch_size: not an option of program; write --set data.batch_size=8\n"


def test_help_names_every_option(monkeypatch, capsys) -> None:
    for main, options in (
        (train_program.main, ["--config", "--set", "--run", "--print-config"]),
        (
            test_program.main,
            [
                "--run",
                "--checkpoint",
                "--config",
                "--weights",
                "--format",
                "--on",
                "--split",
                "--i2t",
                "--dump",
                "--set",
            ],
        ),
    ):
        status, out, _ = run_program(main, monkeypatch, capsys, "--help")
        assert status == 0 and all(option in out for option in options)


# --- odd images and captions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_training_with_its_path(
    workers: int, root: Path, tiny: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(root, tmp_path / "copy")
    bad = sorted((tmp_path / "copy/SyntheticPEDES/imgs/train").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:600])
    arguments = ["--config", ROOT / "configs/irra.yaml", "--set", *tiny]
    overrides = [f"data.root={tmp_path / 'copy'}", f"data.workers={workers}"]
    status, _, error = run_program(train_program.main, monkeypatch, capsys, *arguments, *overrides)
    assert status == 1 and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {bad}: unreadable image")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_missing_image_is_said_before_training_and_evaluation(
    split: str, finished: Path, root: Path, tiny: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(root, copy := tmp_path / "copy")
    gone = sorted((copy / "SyntheticPEDES/imgs" / split).iterdir())[1]
    gone.unlink()
    start = ["--config", ROOT / "configs/irra.yaml", "--run", tmp_path / "run", "--set", *tiny]
    evaluate = ["--run", finished, "--split", "val" if split == "val" else "test", "--set"]
    for program, arguments in ((train_program, start), (test_program, evaluate)):
        if program is train_program or split != "train":
            status, _, error = run_program(program.main, monkeypatch, capsys, *arguments, f"data.root={copy}")
            assert status == 1 and "imgs: must have all " in error and f"got none for 1: {split}/{gone.name}; " in error
    assert not (tmp_path / "run").exists()


def test_skipped_images_are_counted_and_reported(
    root: Path, tiny: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(root, tmp_path / "copy")
    gone, cut = (sorted((tmp_path / "copy/SyntheticPEDES/imgs" / split).iterdir())[1] for split in ("train", "test"))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:600])
    arguments = ["--config", ROOT / "configs/irra.yaml", "--run", tmp_path / "run", "--set", *tiny, "train.epochs=2"]
    overrides = [f"data.root={tmp_path / 'copy'}", "data.on_bad_image=skip"]
    status, out, error = run_program(train_program.main, monkeypatch, capsys, *arguments, *overrides)
    assert status == 0, error
    assert out.count(f"after epoch 1: replaced 1 unreadable training images: {gone}") == 1
    assert "after epoch 2" not in out  # logged once
    assert f"skipped 1 unreadable gallery images: {cut}" in out
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["bad_images"] for record in records] == [1, 1]
    arguments = ["--run", tmp_path / "run", "--dump", tmp_path / "ranks.jsonl"]
    assert run_program(test_program.main, monkeypatch, capsys, *arguments)[0] == 0
    ranks = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert len(ranks) == 4 * 2 * 2
    assert {found["image"] for line in ranks for found in line["top"]} == {
        str(path) for path in cut.parent.iterdir() if path != cut
    }


def test_empty_and_endless_captions_train_to_the_end(
    root: Path, tiny: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(root, tmp_path / "copy")
    file = tmp_path / "copy/SyntheticPEDES/reid_raw.json"
    rows = json.loads(file.read_text())
    for row in rows:
        row["captions"] = ["", "a red coat and " * 100]
    file.write_text(json.dumps(rows))
    arguments = ["--config", ROOT / "configs/irra.yaml", "--run", tmp_path / "run", "--set", *tiny]
    status, out, error = run_program(
        train_program.main, monkeypatch, capsys, *arguments, f"data.root={tmp_path / 'copy'}"
    )
    assert status == 0, error
    assert "nan" not in out and (tmp_path / "run/best.pt").exists()


@pytest.mark.parametrize("program", ["train.py", "test.py"])
def test_help_and_misspelt_keys_do_not_wait_for_pytorch(program: str) -> None:
    code = f"import runpy, sys; sys.argv[0] = '{program}'\ntry: runpy.run_path('{program}', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules, file=sys.stderr)"
    mistake = ["--config", "configs/irra.yaml", "--set", "train.epoch=3"]
    for arguments, said in ((["--help"], "usage"), (mistake, "error: train.epoch: unknown key")):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert said in done.stdout + done.stderr and done.stderr.endswith("False\n")
