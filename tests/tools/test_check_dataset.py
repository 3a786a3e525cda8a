"""tools/check_dataset.py: finds, names and counts every planted fault and nothing else."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.helpers.configs import CONFIGS
from tests.helpers.programs import run_program
from tools import check_dataset
from tools.dataset_checks import OFFICIAL

ERROR, WARNING, NOTE = "error", "warning", "note"


def row(split: str, pid: object, name: str, *captions: str, field: str = "file_path") -> dict[str, Any]:
    return {"split": split, "id": pid, field: name, "captions": list(captions) or [f"{name} one", f"{name} two"]}


def write(folder: Path, file: str, rows: list[dict[str, Any]]) -> None:
    """Write a data set with these annotations and images of random pixels, all different."""
    for row in rows:
        path = folder / "imgs" / (row.get("img_path") or row["file_path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(list(bytes(path.relative_to(folder.parent)))).integers(
            0, 256, (24, 8, 3), np.uint8
        )
        Image.fromarray(pixels).save(path)
    (folder / file).write_text(json.dumps(rows))


def clean_rows(field: str = "file_path") -> list[dict[str, Any]]:
    return [
        row(split, pid, f"{split}/{pid}_{number}.png", field=field)
        for split, pid in (("train", 0), ("train", 1), ("val", 2), ("test", 3))
        for number in range(2)
    ]


@pytest.fixture
def run(root: Path, tmp_path: Path, monkeypatch, capsys):
    """Run the tool on data sets under tmp_path; return its exit status, stdout and JSON."""

    def run(*arguments: object, tokenizer: object = root / "SyntheticPEDES/tokenizer") -> tuple[object, str, Any]:
        options = ["--root", tmp_path, "--json", tmp_path / "out.json", "--tokenizer", tokenizer]
        status, out, err = run_program(check_dataset.main, monkeypatch, capsys, *options, *arguments)
        assert "Traceback" not in err
        return status, out, json.loads((tmp_path / "out.json").read_text())

    return run


def kinds(content: Any, name: str = "cuhk_pedes") -> dict[str, tuple[str, int, list[str]]]:
    """Map each kind to (level, count, examples), without the official counts, which a small data set never has."""
    findings = [finding for finding in content[name]["findings"] if finding["kind"] != "official_counts"]
    assert max(Counter(finding["kind"] for finding in findings).values(), default=1) == 1
    return {finding["kind"]: (finding["level"], finding["count"], finding["examples"]) for finding in findings}


def plant_faults(folder: Path) -> None:
    """Write a CUHK-PEDES with every fault that needs no second data set."""
    sound = [
        row("train", 1, "a1.png"),
        row("train", 1, "a2.png", "Walks.", " walks. "),
        row("train", 2, "b1.png", "WALKS.", "She walks."),
        row("train", 2, "b2.png"),
        row("train", 2, "b2.png", "The same file, annotated once more."),
        row("train", 9, "c1.png", "", " \n"),
        row("train", 9, "c2.png", "黑色 coat", "Ein Mädchen mit Кепка", "Un garçon, très élégant “naïve”"),
        row("train", 9, "truncated.png"),
        row("train", 9, "text.png"),
        row("train", 9, "missing\n.png"),
        row("val", 1, "v1.png", "Same text.", "SAME   text."),
        row("val", 20, "v2.png", "Same text.", "Another."),
        row("val", 20, "v3.png"),
        row("test", 30, "t1.png", "\ud800 half a letter", "an old\u001b[31m man"),
        row("test", 30, "t2.png", "red shirt and " * 60, "x" * 400),
    ]
    write(folder, "reid_raw.json", sound)
    imgs = folder / "imgs"
    shutil.copy(imgs / "a1.png", imgs / "b1.png")
    shutil.copy(imgs / "v3.png", imgs / "t1.png")
    (imgs / "missing\n.png").unlink()
    (imgs / "text.png").write_text("not an image")
    (imgs / "truncated.png").write_bytes((imgs / "truncated.png").read_bytes()[:300])
    faulty = [
        row("train", "one", "a1.png"),
        row("train", 2**70, "a1.png"),
        row("train", 1, "../a1.png"),
        7,
        {"split": "train", "id": 1, "file_path": "a1.png", "captions": "A man."},
        {"split": "train", "id": 1, "file_path": "a1.png"},
        {"id": 1, "file_path": "a1.png", "captions": ["A man."]},
    ]
    (folder / "reid_raw.json").write_text(json.dumps(sound + faulty))


FAULTS = {
    "no_split": (ERROR, 1, ["annotation 21"]),
    "faulty_annotation": (ERROR, 6, [
        "annotation 15 (a1.png): id must be a 64-bit integer, got 'one'",
        f"annotation 16 (a1.png): id must be a 64-bit integer, got {2**70}",
        "annotation 17 (../a1.png): file_path must lie inside the data set",
        "annotation 18 must be a mapping with split, id, file_path and captions, got int",
        "annotation 19 (a1.png): captions must be a non-empty list of texts",
    ]),
    "missing_image": (ERROR, 1, ["imgs/missing\\n.png"]),
    "unreadable_image": (ERROR, 2, [
        "imgs/truncated.png: unreadable image (image file is truncated)",
        "imgs/text.png: unreadable image (no JPEG, PNG, BMP, GIF, JPEG2000, PPM, TIFF or WEBP by its content)",
    ]),
    "repeated_path": (NOTE, 1, ["imgs/b2.png (2 times)"]),
    "identical_files": (NOTE, 2, ["imgs/a1.png = imgs/b1.png", "imgs/v3.png = imgs/t1.png"]),
    "image_of_several_ids": (WARNING, 2, [
        "imgs/a1.png = imgs/b1.png (ids 1, 2)", "imgs/v3.png = imgs/t1.png (ids 20, 30)",
    ]),
    "image_in_splits": (WARNING, 1, ["imgs/v3.png = imgs/t1.png (val, test)"]),
    "id_in_splits": (WARNING, 1, ["id 1 (train, val)"]),
    "single_image_id": (NOTE, 1, ["id 1 (val)"]),
    "relabelled": (NOTE, 1, []),
    "shared_text_train": (NOTE, 1, ["walks. (ids 1, 2)"]),
    "shared_text_val": (WARNING, 1, ["same text. (ids 1, 20)"]),
    "empty_caption": (WARNING, 2, ["imgs/c1.png", "imgs/c1.png"]),
    "not_latin": (WARNING, 2, ["imgs/c2.png: 黑色 coat", "imgs/c2.png: ein mädchen mit кепка"]),
    "half_letter": (WARNING, 1, ["imgs/t1.png: \ufffd half a letter"]),
}  # fmt: skip


def test_every_planted_fault_is_found(run, tmp_path: Path) -> None:
    plant_faults(tmp_path / "CUHK-PEDES")
    status, out, content = run("cuhk_pedes")
    assert status == 1 and not content["cuhk_pedes"]["would_train"]
    found = kinds(content)
    long = found.pop("long_caption")
    assert found == FAULTS
    assert long[:2] == (NOTE, 2)  # the number of tokens depends on the vocabulary
    assert all("tokens: imgs/t2.png: " in example and len(example) <= 160 for example in long[2])
    assert "xxx" in long[2][0]  # the longest caption comes first
    splits = content["cuhk_pedes"]["splits"]
    assert [splits["train"][name] for name in ("ids", "images", "captions")] == [3, 9, 20]
    assert splits["train"]["captions_per_image"] == [2, 3] and splits["train"]["images_per_id"] == [2, 5]
    assert splits["train"]["official"] == list(OFFICIAL["cuhk_pedes"]["train"])
    assert [split["r1_ceiling"] for split in splits.values()] == [None, pytest.approx(100 * 5 / 6), 100]
    for finding in content["cuhk_pedes"]["findings"]:  # printed as in the JSON, followed by its examples
        at = out.index(f"{finding['level']:<7} {finding['count']:>7}  {finding['message']}\n")
        assert out[at:].splitlines()[1 : 1 + len(finding["examples"])] == [" " * 19 + e for e in finding["examples"]]
    assert "11003/34054/68126 (differs)" in out and out.count("R@1 cannot exceed 83.33") == out.count("R@1 cannot") == 1
    assert out.splitlines()[-1] == "cuhk_pedes: 4 errors, 8 warnings, 6 notes: training would fail"
    levels = [finding["level"] for finding in content["cuhk_pedes"]["findings"]]
    assert levels == [ERROR] * 4 + [WARNING] * 8 + [NOTE] * 6


def test_a_sound_data_set_has_no_findings_but_its_size(run, tmp_path: Path) -> None:
    write(tmp_path / "CUHK-PEDES", "reid_raw.json", clean_rows())
    status, out, content = run("cuhk_pedes")
    assert status == 0 and content["cuhk_pedes"]["would_train"] and not kinds(content)
    assert out.splitlines()[-1] == "cuhk_pedes: 0 errors, 1 warning, 0 notes: would train"


def test_the_synthetic_data_set_brings_its_tokenizer(root: Path, monkeypatch, capsys) -> None:
    status, out, _ = run_program(check_dataset.main, monkeypatch, capsys, "synthetic", "--root", root)
    assert status == 0 and "not counted" not in out and "official ones" not in out
    assert out.splitlines()[-1].startswith("synthetic: 0 errors, ")
    few = ["--text-length", 5, "--workers", 1]
    _, out, _ = run_program(check_dataset.main, monkeypatch, capsys, "synthetic", "--root", root, *few)
    assert "    60  captions over 5 tokens" in out  # all captions


def test_official_counts_are_compared(run, tmp_path: Path, monkeypatch) -> None:
    counts = {"train": (2, 4, 8), "val": (1, 2, 4), "test": (1, 2, 4)}
    write(tmp_path / "CUHK-PEDES", "reid_raw.json", clean_rows())
    monkeypatch.setitem(OFFICIAL, "cuhk_pedes", counts)
    _, out, content = run("cuhk_pedes")
    assert content["cuhk_pedes"]["findings"] == [] and "differs" not in out and "2/4/8" in out
    monkeypatch.setitem(OFFICIAL, "cuhk_pedes", counts | {"val": (1, 2, 5)})
    status, out, content = run("cuhk_pedes")
    (finding,) = content["cuhk_pedes"]["findings"]
    assert (status, finding["level"], finding["kind"]) == (0, WARNING, "official_counts")
    assert finding["examples"] == ["val: 1/2/4, official 1/2/5"] and out.count("(differs)") == 1


def test_images_shared_by_two_data_sets_are_counted_per_pair_of_splits(run, tmp_path: Path) -> None:
    icfg, rstp = tmp_path / "ICFG-PEDES", tmp_path / "RSTPReid"
    write(icfg, "ICFG_PEDES.json", [row for row in clean_rows() if row["split"] != "val"])
    write(rstp, "data_captions.json", clean_rows("img_path"))
    for mine, other in (("test/3_0", "train/0_0"), ("train/1_0", "train/0_1"), ("train/1_1", "train/1_1")):
        shutil.copy(icfg / f"imgs/{other}.png", rstp / f"imgs/{mine}.png")
    (tmp_path / "few.yaml").write_text(f"base: {CONFIGS}/synthetic.yaml\ndata: {{val_ids: 1, batch_size: 4}}\n")
    status, out, content = run("icfg_pedes", "rstpreid", "icfg_pedes", "--config", tmp_path / "few.yaml")
    assert status == 0 and list(content) == ["icfg_pedes", "rstpreid"]
    assert kinds(content, "icfg_pedes") == {"no_val": (NOTE, 1, []), "msmt17": (NOTE, 1, [])}
    shared = [finding for finding in content["rstpreid"]["findings"] if finding["kind"] == "image_in_other_set"]
    assert [(finding["level"], finding["count"], finding["message"]) for finding in shared] == [
        (WARNING, 1, "images of test that also occur in icfg_pedes train"),
        (WARNING, 2, "images of train that also occur in icfg_pedes train"),
    ]
    assert shared[0]["examples"] == ["imgs/test/3_0.png"]
    assert out.count("both drawn from MSMT17") == 2
    assert set(kinds(run("rstpreid")[2], "rstpreid")) == {"msmt17"}


def test_images_that_are_converted_or_turned_are_counted_with_examples(run, tmp_path: Path) -> None:
    imgs = tmp_path / "CUHK-PEDES/imgs"
    write(imgs.parent, "reid_raw.json", clean_rows())
    Image.new("L", (8, 24)).save(imgs / "train/0_0.png")
    Image.new("I;16", (8, 24)).save(imgs / "train/0_1.png")
    Image.new("RGBA", (8, 24)).save(imgs / "train/1_0.png")
    Image.new("F", (8, 24)).save(imgs / "val/2_0.png", "TIFF")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name in ("test/3_0.png", "test/3_1.png"):
        Image.open(imgs / name).save(imgs / name, exif=exif)
    mode_f = "imgs/val/2_0.png: unreadable image (mode F has no known brightness range; save it with 8 or 16 bits)"
    for option in ([], ["--headers-only"]):
        found = kinds(run(*option, "cuhk_pedes")[2])
        found.pop("headers_only", None)
        assert found == {
            "image_mode_L": (NOTE, 1, ["imgs/train/0_0.png"]),
            "image_mode_I;16": (NOTE, 1, ["imgs/train/0_1.png"]),
            "image_mode_RGBA": (NOTE, 1, ["imgs/train/1_0.png"]),
            "transparency": (NOTE, 1, ["imgs/train/1_0.png"]),
            "orientation_6": (NOTE, 2, ["imgs/test/3_0.png", "imgs/test/3_1.png"]),
            "unreadable_image": (ERROR, 1, [mode_f]),
        }


def test_headers_only_misses_the_truncated_image_and_says_so(run, tmp_path: Path) -> None:
    plant_faults(tmp_path / "CUHK-PEDES")
    status, out, content = run("--headers-only", "cuhk_pedes")
    found = kinds(content)
    assert status == 1 and found["missing_image"] == FAULTS["missing_image"]
    assert found["unreadable_image"] == (ERROR, 1, FAULTS["unreadable_image"][2][1:])
    assert found["headers_only"] == (NOTE, 14, []) and "truncation is not detected, contents were not compared" in out
    assert not {"identical_files", "image_of_several_ids", "image_in_splits"} & set(found)


def test_an_image_annotated_twice_is_read_once_and_its_owners_are_compared(run, tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "CUHK-PEDES", "reid_raw.json", [*clean_rows(), row("test", 0, "train/0_0.png")])
    read: list[str] = []
    look_at = check_dataset.look_at
    monkeypatch.setattr(check_dataset, "look_at", lambda *a, **k: read.append(a[1]) or look_at(*a, **k))
    for option in ([], ["--headers-only"]):
        status, _, content = run(*option, "cuhk_pedes")
        found = kinds(content)
        assert status == 1 and found["torn_image"] == (ERROR, 1, ["imgs/train/0_0.png (id 0 in train, id 0 in test)"])
        assert found["repeated_path"] == (NOTE, 1, ["imgs/train/0_0.png (2 times)"])
        assert found["image_in_splits"] == (WARNING, 1, ["imgs/train/0_0.png (train, test)"])
        assert "image_of_several_ids" not in found and "identical_files" not in found
    assert len(read) == 2 * len(set(read)) == 2 * 8


def test_split_names_are_counted(run, tmp_path: Path) -> None:
    rows = clean_rows()
    rows[0]["split"], rows[1]["split"], rows[2]["split"] = "Train", "Train", "dev"
    write(tmp_path / "CUHK-PEDES", "reid_raw.json", rows)
    status, _, content = run("cuhk_pedes")
    found = kinds(content)
    assert status == 1 and found["misspelt_split"] == (ERROR, 1, ["'Train' (2 annotations; did you mean 'train'?)"])
    assert found["other_split"] == (WARNING, 1, ["'dev' (1 annotation)"])


def test_the_split_less_file_is_recognised_in_one_line(run, tmp_path: Path) -> None:
    splitless = [{key: row[key] for key in ("id", "file_path", "captions")} for row in clean_rows()]
    write(tmp_path / "CUHK-PEDES", "reid_raw.json", splitless)
    status, out, content = run("cuhk_pedes")
    assert status == 1 and out.count("caption_all.json") == 1 and "use reid_raw.json" in out
    assert kinds(content) == {
        "no_split": (ERROR, 8, [f"annotation {number}" for number in range(5)]),
        "missing_split": (ERROR, 2, ["train", "test"]),
        "missing_val": (WARNING, 1, []),
    }


@pytest.mark.parametrize("rows", ["[]", "[1, null, [], {}]", '[{"split": "test", "id": 1}]'])
def test_nothing_usable_is_an_error_and_no_crash(rows: str, run, tmp_path: Path) -> None:
    (tmp_path / "CUHK-PEDES").mkdir()
    (tmp_path / "CUHK-PEDES/reid_raw.json").write_text(rows)
    status, _, content = run("cuhk_pedes")
    assert status == 1 and kinds(content)["missing_split"] == (ERROR, 2, ["train", "test"])
    assert list(content["cuhk_pedes"]["splits"]["test"].values()) == [0, 0, 0, [1000, 3074, 6156], None, None, None]


def test_a_missing_folder_and_broken_json_do_not_hide_the_other_data_sets(run, tmp_path: Path) -> None:
    write(tmp_path / "RSTPReid", "data_captions.json", clean_rows("img_path"))
    (tmp_path / "ICFG-PEDES").mkdir()
    (tmp_path / "ICFG-PEDES/ICFG-PEDES.json").write_text("[{")
    status, out, content = run("cuhk_pedes", "icfg_pedes", "rstpreid")
    assert status == 1
    for name, message in (("cuhk_pedes", "no such data set folder"), ("icfg_pedes", "not a readable JSON file")):
        (finding,) = content[name]["findings"]
        assert (finding["level"], finding["kind"], finding["count"]) == (ERROR, "no_annotations", 1)
        assert message in finding["message"] and content[name]["splits"] == {}
    assert content["rstpreid"]["would_train"] and "rstpreid: 0 errors" in out


def test_a_missing_tokenizer_is_an_error(run, tmp_path: Path) -> None:
    write(tmp_path / "CUHK-PEDES", "reid_raw.json", clean_rows())
    status, out, content = run("cuhk_pedes", tokenizer="/nowhere")
    assert status == 1 and kinds(content) == {"no_tokenizer": (ERROR, 1, [])}
    assert "train.py refuses: data.tokenizer: no tokenizer '/nowhere' found" in out and "set it to a hub name" in out


MISTAKES = {
    "name": (["cuhk_pedess"], 1, "error: data set: unknown data set 'cuhk_pedess'; did you mean 'cuhk_pedes'?"),
    "json": (["cuhk_pedes", "--json", "/no/such/file.json"], 1, "error: --json /no/such/file.json: cannot be written"),
    "workers": (["cuhk_pedes", "--workers", "0"], 2, "error: --workers: must be at least 1, got 0"),
}


@pytest.mark.parametrize("arguments, expected, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_exit_with_one_line(arguments, expected, message, tmp_path: Path, monkeypatch, capsys) -> None:
    status, _, error = run_program(check_dataset.main, monkeypatch, capsys, *arguments, "--root", tmp_path)
    assert status == expected and message in error.splitlines()[-1] and "Traceback" not in error
