"""Annotation files of other projects: named by their keys, with what to do, and never taken for each other."""

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import pytest

from datasets.annotations import load_annotations
from utils.errors import DataError

SPLITLESS = {"id": 1, "file_path": "a.jpg", "captions": ["A man."]}
APTM = {"image": "a.jpg", "caption": "A man.", "image_id": 1}
ROWS = {
    "caption_all": (SPLITLESS, "the form without splits, as in CUHK-PEDES's caption_all.json"),
    "SSAN": ({"img_path": "a.jpg", "id": 1, "tokens": [], "captions": []}, "the form without splits"),
    "SYNTH-PEDES": (SPLITLESS | {"attributes": [], "prompt_caption": []}, "the form of SYNTH-PEDES"),
    "APTM": (APTM, "the form of APTM, RaSa and ALBEF"),
    "MALS": (APTM | {"label": [0, 1]}, "the form of APTM, RaSa and ALBEF"),
    "TextReID": ({"id": 1, "image_id": 3, "file_path": "a.jpg", "sentence": "A man."}, "the form of TextReID"),
    "ViTAA": ({"id": 1, "image_id": 3, "file_path": "a.jpg", "onehot": [3]}, "the form of TextReID and ViTAA"),
    "LLaVA": ({"id": "a", "image": "a.jpg", "conversations": []}, "LLaVA's conversations"),
    "Karpathy": ({"filename": "a.jpg", "sentences": [], "split": "train"}, "Karpathy's form"),
    "COCO": ({"id": 1, "image_id": 3, "caption": "A man."}, "COCO's captions"),
    "pairs": ({"image": "a.jpg", "text": "A man."}, "image-text pairs without identities"),
    "unknown": ({"path": "a.jpg", "person": 3, "desc\nription": "A man."}, "its keys are path, person, desc"),
    "unknown with our fields": ({**SPLITLESS, "split": "train", "captions": 0} | {"x": 1}, "captions must be"),
}
FILES = {
    "TextReID": (json.dumps({"annotations": [APTM]}), "the form of TextReID and ViTAA"),
    "COCO": (json.dumps({"images": [], "annotations": []}), "its keys are images, annotations: COCO's captions"),
    "Karpathy": (json.dumps({"images": [], "dataset": "coco"}), "Karpathy's form"),
    "lists by split": (json.dumps({"train": [], "test": []}), "a mapping with a list for each split"),
    "columns": (json.dumps({"id": {"0": 1}, "captions": {"0": []}}), "one annotation, or a table by columns"),
    "unknown": (json.dumps({str(number): [] for number in range(20)}), "4, 5, 6, 7 and 12 more"),
    "JSON lines": (f"{json.dumps(APTM)}\n{json.dumps(APTM)}\n", "JSON lines"),
    "csv": ("id,file_path,caption\n1,a.jpg,A man.\n", "a table of comma- or tab-separated values"),
    "gzip": (gzip.compress(b"[]"), "compressed by gzip"),
    "pickle": (pickle.dumps([SPLITLESS]), "a pickle, which is not read"),
    "Parquet": (b"PAR1\x15\x04", "a Parquet table"),
    "LFS pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
    "HTML page": ("<!DOCTYPE html><html>", "an HTML page"),
    "nothing": ("", "the file is empty"),
}


def message_of(root: Path, name: str, content: str | bytes, dataset: str = "cuhk_pedes") -> str:
    folder = root / {"cuhk_pedes": "CUHK-PEDES", "icfg_pedes": "ICFG-PEDES", "rstpreid": "RSTPReid"}[dataset]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        load_annotations(dataset, root)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("form", ROWS)
def test_rows_of_another_form_are_named_by_their_keys(form: str, tmp_path: Path) -> None:
    row, expected = ROWS[form]
    message = message_of(tmp_path, "reid_raw.json", json.dumps([row, row]))
    assert expected in message and ("caption_all.json" in message) == (form in ("caption_all", "SSAN"))
    if "captions must be" not in expected:
        assert "use reid_raw.json of the data set's authors" in message and str(next(iter(row))) in message


@pytest.mark.parametrize("form", FILES)
def test_a_file_that_is_no_list_is_told_by_what_it_is(form: str, tmp_path: Path) -> None:
    content, expected = FILES[form]
    message = message_of(tmp_path, "data_captions.json", content, "rstpreid")
    assert expected in message and "use data_captions.json of the data set's authors" in message


@pytest.mark.parametrize("dataset, official", [("cuhk_pedes", "reid_raw.json"), ("icfg_pedes", "ICFG-PEDES.json")])
def test_a_file_under_another_name_is_told_where_the_annotations_are_missing(
    dataset: str, official: str, tmp_path: Path
) -> None:
    message = message_of(tmp_path, "caption_all.json", json.dumps([SPLITLESS]), dataset)
    assert "no such annotation file; caption_all.json is there: the form without splits" in message
    assert f"{official} is needed, which has them" in message
    message = message_of(tmp_path, "annotations/train.json", json.dumps([APTM]), dataset)
    assert "annotations/train.json is there: its keys are image, caption, image_id: the form of APTM" in message
    message = message_of(tmp_path, "a (1).json", json.dumps([SPLITLESS | {"split": "val"}]), dataset)
    assert f"a (1).json is there: it has the form of {official}; rename it if it holds all splits" in message
    for number in range(4):
        message = message_of(tmp_path, f"x{number}.csv", "a,b\n1,2\n", dataset)
    assert "and 2 other files" in message and "x1.csv is there: a table of comma" in message


def test_a_zip_archive_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("reid_raw.json", "[]")
    assert "reid_raw.zip is there: a zip archive" in message_of(
        tmp_path, "reid_raw.zip", (tmp_path / "a.zip").read_bytes()
    )
