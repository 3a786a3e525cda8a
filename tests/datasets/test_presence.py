"""datasets/presence.py: missing images are counted and named before anything is computed."""

import os
import re
from pathlib import Path

import pytest

from configs.schema import DataConfig
from datasets.annotations import Annotations, Record
from datasets.presence import require_images
from utils.errors import DataError


def annotate(folder: Path, *names: str, test: str = "t.jpg") -> Annotations:
    """Training images of these names and a test image, none of which exists."""
    train, other = (
        [Record(str(folder / "imgs" / name), 0, 0, ("a man",), split) for name in some]
        for split, some in (("train", names), ("test", (test,)))
    )
    return Annotations(folder, train, [], other)


def draw(annotations: Annotations) -> None:
    for record in annotations.train + annotations.test:
        path = Path(record.image_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_missing_image_folder_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = rf"^data/imgs \(relative to the working directory {tmp_path}\): no such image folder; .*data\.root"
    for on_bad_image in ("error", "skip"):
        with pytest.raises(DataError, match=message):
            require_images(annotate(Path("data"), "a.jpg"), ["train"], DataConfig(on_bad_image=on_bad_image))


def test_missing_images_are_counted_with_the_first_names(tmp_path: Path) -> None:
    annotations = annotate(tmp_path, *(f"x/{number}.jpg" for number in range(20)), "pipe.jpg", "folder.jpg")
    draw(annotations)
    require_images(annotations, ["train", "val", "test"], DataConfig())
    for name in ["pipe.jpg", "folder.jpg", "t.jpg", *(f"x/{number}.jpg" for number in range(3, 9))]:
        (tmp_path / "imgs" / name).unlink()
    os.mkfifo(tmp_path / "imgs/pipe.jpg")
    (tmp_path / "imgs/folder.jpg").mkdir()
    with pytest.raises(DataError) as caught:
        require_images(annotations, ["train", "val", "test"], DataConfig())
    assert str(caught.value) == (
        f"{tmp_path}/imgs: must have all 23 images of the annotations, got none for 9: x/3.jpg, x/4.jpg, x/5.jpg, "
        "x/6.jpg, x/7.jpg and 4 more; complete the data set, or set data.on_bad_image=skip"
    )
    require_images(annotations, ["val"], DataConfig())  # has no images
    require_images(annotations, ["train"], DataConfig(on_bad_image="skip"))


@pytest.mark.parametrize("name", ["Train/A.JPG", "train\\a.jpg", "TRAIN\\a.jpg"])
def test_a_name_that_differs_only_in_spelling_is_shown(name: str, tmp_path: Path) -> None:
    draw(annotate(tmp_path, "train/a.jpg"))
    message = f"(1 differ from a file only in case, separators or Unicode form, as {name!r} from 'train/a.jpg')"
    with pytest.raises(DataError, match=re.escape(message)):
        require_images(annotate(tmp_path, name, "other.jpg"), ["train"], DataConfig())


def test_a_name_in_another_unicode_form_is_shown(tmp_path: Path) -> None:
    draw(annotate(tmp_path, "e\u0301.jpg"))  # as macOS writes é
    with pytest.raises(DataError, match="1 differ from a file only in case, separators or Unicode form"):
        require_images(annotate(tmp_path, "\u00e9.jpg"), ["train"], DataConfig())


@pytest.mark.parametrize("name", ["null\0byte.jpg", "\ud800.jpg", "a" * 300])
def test_names_that_no_file_can_have_are_missing(name: str, tmp_path: Path) -> None:
    (tmp_path / "imgs").mkdir()
    with pytest.raises(DataError, match="got none for 1: "):
        require_images(annotate(tmp_path, name), ["train"], DataConfig())
