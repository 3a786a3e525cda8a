"""tools/check_dataset.py --config: what train.py would refuse at its start is an error, with exit status 1."""

from pathlib import Path
from typing import Any

import pytest

from configs.schema import load_config
from processor import training
from processor.resolve import resolve
from tests.helpers.configs import CONFIGS
from tests.helpers.layouts import write_layout
from tests.helpers.programs import run_program
from tools import check_dataset
from utils.errors import UserError

SMALL = ["data.workers=0", "data.batch_size=8", "data.val_ids=2"]
REFUSED = {
    "val_ids above the identities": (["data.val_ids=8"], "data.val_ids: must be less than the 8 training identities"),
    "nothing to select on": (["data.val_ids=0"], "has no val split to select on; set data.val_ids=200"),
    "identity sampler": (
        ["data.sampler=identity", "data.batch_size=32", "data.num_instances=2"],
        "data.batch_size: a batch of 32 needs 16 identities",
    ),
    "attributes": (
        ["data.text_levels=[word]", "data.word_source=attributes"],
        "data.word_source: needs annotations with attributes",
    ),
    "vocabulary": (["model.text.options.vocab_size=520"], "data.tokenizer: the text tower has 520 tokens"),
    "tokenizer": (["data.tokenizer=nowhere/x.json"], "data.tokenizer: no tokenizer 'nowhere/x.json' found"),
    "weights": (
        ["model.image.arch=vit_base_patch16_clip_quickgelu_224.openai", "model.image.pretrained=true"],
        "model.image.arch: cannot get the weights",
    ),
    "initial checkpoint": (["init.path=nowhere.pt"], "nowhere.pt"),
    "teacher": (
        ["losses.distill_features={}"],
        "teacher.checkpoint: the losses distil from a trained teacher",
    ),
}


@pytest.fixture
def data(root: Path, tmp_path: Path) -> Path:
    """ICFG-PEDES in miniature: 8 training identities with 2 images each, no val split."""
    write_layout(root, tmp_path, "icfg_pedes")
    return tmp_path


def checked(data: Path, monkeypatch: Any, capsys: Any, *overrides: str) -> tuple[object, str]:
    arguments = ["icfg_pedes", "--config", CONFIGS / "cuhk_small.yaml", "--root", data, "--set", *SMALL, *overrides]
    status, out, err = run_program(check_dataset.main, monkeypatch, capsys, *arguments)
    assert "Traceback" not in err
    return status, out


@pytest.mark.parametrize("case", REFUSED)
def test_what_train_refuses_is_an_error(case: str, data: Path, monkeypatch, capsys) -> None:
    overrides, message = REFUSED[case]
    status, out = checked(data, monkeypatch, capsys, *overrides)
    (line,) = [line for line in out.splitlines() if "train.py refuses: " in line]
    assert status == 1 and line.startswith("error ") and message in line
    assert out.splitlines()[-1].endswith("training would fail")
    everything = ["data.dataset=icfg_pedes", f"data.root={data}", *SMALL, *overrides]
    with pytest.raises(UserError) as caught:
        training.train(resolve(load_config(CONFIGS / "cuhk_small.yaml", everything)), data / "run")
    assert message in str(caught.value)


def test_what_train_takes_is_none(data: Path, monkeypatch, capsys) -> None:
    status, out = checked(data, monkeypatch, capsys)
    assert status == 0 and "train.py refuses" not in out and "data.batch_size" not in out
    status, out = checked(data, monkeypatch, capsys, "data.batch_size=500", "data.text_length=5")
    assert status == 0 and "data.batch_size (500) is above the 24 training pairs" in out
    assert "captions over 5 tokens (start and end included), which are cut; the longest\n" in out
    status, out = checked(data, monkeypatch, capsys, "data.val_ids=0", "eval.select_on=test")
    assert status == 0 and "train.py refuses" not in out


def test_skipped_images_are_no_error(data: Path, root: Path, monkeypatch, capsys) -> None:
    imgs = data / "ICFG-PEDES/imgs"
    imgs.unlink()
    imgs.mkdir()
    for folder in ("train", "test"):
        (imgs / folder).mkdir()
        for image in sorted((root / "SyntheticPEDES/imgs" / folder).iterdir())[1:]:
            (imgs / folder / image.name).symlink_to(image)
    for policy, expected in (("error", 1), ("skip", 0)):
        status, out = checked(data, monkeypatch, capsys, f"data.on_bad_image={policy}")
        assert status == expected and "2  missing images (" in out


def test_a_plain_check_needs_a_data_set_and_set_needs_a_config(monkeypatch, capsys) -> None:
    status, _, err = run_program(check_dataset.main, monkeypatch, capsys)
    assert status == 2 and "a data set or --config is required" in err
    status, _, err = run_program(check_dataset.main, monkeypatch, capsys, "cuhk_pedes", "--set", "data.views=2")
    assert status == 1 and "error: --set: needs --config" in err
