"""tools/sample_sheet.py: a sheet of rendered pedestrians with their captions."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from datasets.synthetic.render import render_dataset
from tools import sample_sheet


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"train_ids": 3, "val_ids": 1, "test_ids": 2, "images_per_id": 2, "captions_per_image": 2}
    return render_dataset(tmp_path_factory.mktemp("data"), **sizes)


def test_sample_sheet(rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "docs" / "sheet.png"
    sample_sheet.main(["--root", str(rendered.parent), "--out", str(out), "--count", "5"])
    assert out.stat().st_size < 300_000
    with Image.open(out) as sheet:
        assert sheet.width == 4 * sample_sheet.CELL[0] and sheet.height > 3 * sample_sheet.CELL[1]
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--count", "6"], "error: --count: must be from 1 to 5"),
        (["--seed", "-1"], "error: --seed: must be at least 0, got -1"),
        (["--out", "/dev/full"], "error: /dev/full: cannot be written (No space left on device)"),
        (["--root", "/proc/none"], "error: /proc/none: cannot be written (No such file or directory)"),
    ],
)
def test_mistakes_and_a_full_disk_end_in_one_line(arguments: list[str], message: str, rendered: Path, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample_sheet.main(
            ["--root", str(rendered.parent), "--out", str(tmp_path / "a.png"), "--count", "2", *arguments]
        )
    assert capsys.readouterr().err.startswith(message)


def test_damaged_annotations_are_named(rendered: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(rendered, tmp_path / rendered.name)
    (tmp_path / rendered.name / "reid_raw.json").write_text('[{"id": 1}]')
    with pytest.raises(SystemExit):
        sample_sheet.main(["--root", str(tmp_path), "--out", str(tmp_path / "a.png")])
    assert re.match(r"error: \S+reid_raw\.json", capsys.readouterr().err)
