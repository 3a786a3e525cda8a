"""test.py from the command line: exit status, one-line errors, no traceback."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch

import test as test_program
from configs.schema import load_config
from processor import testing, training
from processor.resolve import resolve
from tests.helpers.configs import ROOT, TINY
from tests.helpers.programs import run_program
from utils.yaml_text import read_yaml, settled


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = resolve(load_config(ROOT / "configs/baseline.yaml", [*TINY, f"data.root={root}"]))
    return training.train(config, tmp_path_factory.mktemp("cli") / "run")


def other_architecture(run: Path, folder: Path) -> list[object]:
    return ["--run", run, "--set", "model.text.options.num_hidden_layers=2"]


def cut_in_half(run: Path, folder: Path) -> list[object]:
    (folder / "half.pt").write_bytes((run / "best.pt").read_bytes()[: (run / "best.pt").stat().st_size // 2])
    return ["--run", run, "--checkpoint", folder / "half.pt"]


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/this_must_not_be_made",)


def with_code(run: Path, folder: Path) -> list[object]:
    torch.save({"model": Code()}, folder / "code.pt")
    return ["--run", run, "--checkpoint", folder / "code.pt"]


def without_model(run: Path, folder: Path) -> list[object]:
    torch.save({"weights": {}}, folder / "other.pt")
    return ["--run", run, "--checkpoint", folder / "other.pt"]


TEST_MISTAKES = {
    "no run": (lambda run, folder: ["--run", folder], "not a run folder (it has no config.yaml)"),
    "no checkpoint": (
        lambda run, folder: ["--run", run, "--checkpoint", "bst"],
        "bst (relative to the working directory",
    ),
    "other architecture": (other_architecture, "does not fit the model of this config, nothing was loaded; "),
    "cut in half": (cut_in_half, "half.pt: damaged, or no checkpoint"),
    "code": (with_code, "code.pt: refused"),
    "no model": (without_model, "other.pt: must hold a state dict"),
    "no data": (lambda run, folder: ["--run", run, "--set", "data.dataset=cuhk_pedes"], "CUHK-PEDES: no such data set"),
    "dump": (lambda run, folder: ["--run", run, "--dump", folder / "no/such/file"], "cannot be written"),
}


@pytest.mark.parametrize("case", TEST_MISTAKES)
def test_test_mistakes_exit_with_one_line(case: str, finished: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    make, message = TEST_MISTAKES[case]
    status, _, error = run_program(test_program.main, monkeypatch, capsys, *make(finished, tmp_path))
    assert status == 1
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not Path("/tmp/this_must_not_be_made").exists()


def test_a_checkpoint_is_named_in_its_run_or_by_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, named = tmp_path / "run", testing.checkpoint_path
    run.mkdir()
    (run / "epoch_002.pt").touch()
    monkeypatch.chdir(tmp_path)
    assert named(run, "best") == run / "best.pt" and named(run, "last.pt") == run / "last.pt"
    assert named(run, "epoch_002") == run / "epoch_002.pt"
    (tmp_path / "last.pt").touch()
    assert named(run, "last.pt") == Path("last.pt") and named(run, "elsewhere.pt") == Path("elsewhere.pt")


def test_a_run_folder_stands_for_its_best_weights(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", finished / "config.yaml", "--weights", finished]
    status, out, err = run_program(test_program.main, monkeypatch, capsys, *config)
    assert status == 0 and f"{finished / 'best.pt'}, epoch" in out + err


def test_the_dump_escapes_half_a_surrogate_pair(tmp_path: Path) -> None:
    record = {"caption": "red \ud83d \u5b9e", "image": "\udcca.jpg"}
    testing.write_dump(tmp_path / "dump.jsonl", iter([record]))
    assert json.loads((tmp_path / "dump.jsonl").read_text(encoding="utf-8")) == record


def test_paths_outside_the_first_65536_letters_reach_the_config() -> None:
    arguments = argparse.Namespace(weights=Path("\U0001f600.pt"), format=None)
    assert settled(read_yaml(test_program.init_overrides(arguments)[0].partition("=")[2])) == "\U0001f600.pt"


def test_options_of_init_describe_the_weights_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--config", str(ROOT / "configs/irra.yaml"), "--weights", "w.pth", "--set", "init.image_size=224,224"]
    monkeypatch.setattr("sys.argv", ["test.py", *command])
    config = test_program.given_config(test_program.parse_arguments())
    assert config is not None and (config.init.path, config.init.image_size) == ("w.pth", (224, 224))
