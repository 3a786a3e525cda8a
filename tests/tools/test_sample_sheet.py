"""tools/sample_sheet.py: a sheet of rendered pedestrians with their captions."""

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
    with pytest.raises(SystemExit, match="--count: must be from 1 to 5"):
        sample_sheet.main(["--root", str(rendered.parent), "--out", str(out), "--count", "6"])
