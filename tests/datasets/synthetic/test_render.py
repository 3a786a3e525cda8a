"""Rendering of the synthetic data set: deterministic bytes, atomic folder, layout."""

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datasets.synthetic import render as synthetic
from datasets.synthetic.render import FOLDER, plan_identity, render_dataset
from datasets.text.tokenizers import build_tokenizer

TINY: dict[str, int] = {"train_ids": 3, "val_ids": 1, "test_ids": 2, "images_per_id": 2, "captions_per_image": 2}
# SHA-256 of reid_raw.json for TINY and seed 0. A new value means that everyone's synthetic data set changes.
TINY_SHA256 = "ad15641265d4cb4f51d9b200edcaa65c6ba3e9cfa351754a704068b0399cdaa4"


def contents(folder: Path) -> dict[str, bytes]:
    """Contents of all files, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def annotations(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "reid_raw.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_dataset(tmp_path_factory.mktemp("data"), **TINY)


def test_the_same_seed_gives_the_same_bytes(rendered: Path, tmp_path: Path) -> None:
    assert contents(render_dataset(tmp_path, **TINY)) == contents(rendered)


def test_annotations_are_those_of_the_pinned_seed(rendered: Path) -> None:
    assert hashlib.sha256((rendered / "reid_raw.json").read_bytes()).hexdigest() == TINY_SHA256


def test_another_seed_is_another_data_set(rendered: Path, tmp_path: Path) -> None:
    other = contents(render_dataset(tmp_path, seed=1, **TINY))
    assert other.keys() == contents(rendered).keys()
    changing = [name for name in other if name != "tokenizer/tokenizer_config.json"]
    assert all(other[name] != contents(rendered)[name] for name in changing)


def test_an_identity_does_not_depend_on_the_counts() -> None:
    assert plan_identity(0, 5, 4, 2)[1][:2] == plan_identity(0, 5, 2, 2)[1]
    assert plan_identity(0, 5, 4, 2)[0] == plan_identity(0, 5, 1, 1)[0] != plan_identity(0, 6, 1, 1)[0]


def test_layout_counts_and_disjoint_splits(rendered: Path) -> None:
    rows = annotations(rendered)
    pids = {split: {row["id"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert pids == {"train": {1, 2, 3}, "val": {4}, "test": {5, 6}}
    assert rows[0]["file_path"] == "train/0001_0.jpg"
    assert len({row["file_path"] for row in rows}) == len(rows) == 12
    for row in rows:
        assert row.keys() == {"id", "file_path", "captions", "split"}
        assert len(row["captions"]) == 2 and all(isinstance(caption, str) for caption in row["captions"])
        with Image.open(rendered / "imgs" / row["file_path"]) as image:
            assert (image.size, image.mode, image.format) == ((64, 128), "RGB", "JPEG")


def test_brings_a_tokenizer_learnt_from_the_training_captions(rendered: Path) -> None:
    tokenizer = build_tokenizer(str(rendered / "tokenizer"), 64)
    assert len(tokenizer.encode(annotations(rendered)[0]["captions"][0])) == 64


def test_the_tokenizer_learns_from_training_captions_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[str] = []
    monkeypatch.setattr(synthetic, "train_tokenizer", lambda captions, folder: learnt.extend(captions))
    rows = annotations(render_dataset(tmp_path, **TINY))
    assert learnt == [caption for row in rows if row["split"] == "train" for caption in row["captions"]]


def test_an_existing_folder_is_left_alone(rendered: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in rendered.rglob("*")}
    assert render_dataset(rendered.parent, seed=9) == rendered
    assert {path: path.stat().st_mtime_ns for path in rendered.rglob("*")} == before


def test_leftovers_of_a_killed_rendering_are_not_used(rendered: Path, tmp_path: Path) -> None:
    dead_pid = 2**22 + 1  # above the largest pid of Linux
    mine = tmp_path / f".{FOLDER}.{socket.gethostname()}.{dead_pid}.tmp"
    stale, live = tmp_path / f".{FOLDER}.elsewhere.1.tmp", tmp_path / f".{FOLDER}.elsewhere.2.tmp"
    for draft in (mine, stale, live):
        (draft / "imgs" / "train").mkdir(parents=True)
        (draft / "imgs" / "train" / "0001_0.jpg").write_bytes(b"half")
    for path in (stale, stale / "imgs", stale / "imgs" / "train"):
        os.utime(path, (0, 0))
    assert contents(render_dataset(tmp_path, **TINY)) == contents(rendered)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / FOLDER, live])


def test_a_failed_rendering_leaves_nothing(rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("out of paint")

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "draw", failing)
        with pytest.raises(RuntimeError, match="out of paint"):
            render_dataset(tmp_path, **TINY)
    assert list(tmp_path.iterdir()) == []
    assert contents(render_dataset(tmp_path, **TINY)) == contents(rendered)


def test_the_slower_of_two_renderings_discards_its_copy(
    rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = synthetic._publish

    def overtaken(draft: Path, folder: Path) -> None:
        (folder / "imgs").mkdir(parents=True)
        publish(draft, folder)

    monkeypatch.setattr(synthetic, "_publish", overtaken)
    folder = render_dataset(tmp_path, **TINY)
    assert [path.name for path in folder.iterdir()] == ["imgs"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", [*TINY, "seed"])
def test_a_bad_argument_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        render_dataset(tmp_path, **{**TINY, name: -1})


def test_a_root_that_cannot_be_a_folder_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        render_dataset(tmp_path / "file", **TINY)


def test_a_full_disk_is_named_with_the_data_set_and_leaves_nothing(tmp_path: Path, small_disk) -> None:
    small_disk(500)
    with pytest.raises(OSError) as caught:
        render_dataset(tmp_path, train_ids=1, val_ids=1, test_ids=1)
    assert caught.value.filename == str(tmp_path / FOLDER) and not list(tmp_path.iterdir())
