"""Miniature data sets in the real layouts, made of the rendered pedestrians."""

import json
from pathlib import Path

LAYOUTS = {  # data set -> (folder, annotation file, field with the image path)
    "cuhk_pedes": ("CUHK-PEDES", "reid_raw.json", "file_path"),
    "icfg_pedes": ("ICFG-PEDES", "ICFG-PEDES.json", "file_path"),
    "rstpreid": ("RSTPReid", "data_captions.json", "img_path"),
}


def write_layout(rendered: Path, root: Path, dataset: str, *, longest: str = "") -> Path:
    """Write the rendered data set under `root` as another one, without its tokenizer; returns its folder.

    Args:
        rendered: root of the rendered data.
        root: data root to write in.
        dataset: name of the adapter; ICFG-PEDES gets no val split.
        longest: caption to put in the place of the first one of training.
    """
    folder, file, field = LAYOUTS[dataset]
    rows = json.loads((rendered / "SyntheticPEDES/reid_raw.json").read_text())
    rows = [{field if key == "file_path" else key: value for key, value in row.items()} for row in rows]
    if dataset == "icfg_pedes":
        rows = [row for row in rows if row["split"] != "val"]
    if longest:
        next(row for row in rows if row["split"] == "train")["captions"][0] = longest
    (root / folder).mkdir()
    (root / folder / "imgs").symlink_to(rendered / "SyntheticPEDES/imgs")
    (root / folder / file).write_text(json.dumps(rows))
    return root / folder
