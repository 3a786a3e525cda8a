"""Draw a sheet of synthetic pedestrians and captions: `python -m tools.sample_sheet --out docs/synthetic.png`."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configs.arguments import Parser
from datasets.annotations import SPLITS, Record, load_annotations
from datasets.images import read_image
from datasets.synthetic.render import render_dataset
from utils.errors import ConfigError
from utils.exit import exit_on_user_error
from utils.paths import expand, naming

COLUMNS, CELL, ZOOM, FONT_SIZE, LINE = 4, (236, 384), 2, 13, 17  # sizes in pixels
MAX_BYTES = 300_000
INK, PAPER = (32, 32, 36), (255, 255, 255)


def chosen_records(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """One image each of `count` people, then all images of another person.

    Args:
        records: all images.
        count: number of people with one image.
        seed: random seed of the choice.

    Raises:
        ConfigError: the data set has too few people.
    """
    pids = sorted({record.pid for record in records})
    if not 1 <= count < len(pids):
        raise ConfigError(
            f"--count: must be from 1 to {len(pids) - 1} (one less than the number of people), got {count}"
        )
    rng = np.random.default_rng(seed)
    *few, one = (int(pid) for pid in rng.choice(pids, count + 1, replace=False))
    images = {pid: [record for record in records if record.pid == pid] for pid in (*few, one)}
    picked = [images[pid][int(rng.integers(len(images[pid])))] for pid in few]
    return picked + images[one]


def paint_sheet(folder: Path, count: int, seed: int) -> Image.Image:
    """Draw the sheet, `COLUMNS` cells wide; the last rows show one person several times."""
    annotations = load_annotations("synthetic", str(folder.parent))
    cells = chosen_records([record for split in SPLITS for record in annotations.split(split)], count, seed)
    first_of_last = -(-count // COLUMNS) * COLUMNS  # the images of one person start a new row
    lines = -(-(first_of_last + len(cells) - count) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL[0], lines * CELL[1] + 2 * LINE), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT_SIZE)
    heading_top = first_of_last // COLUMNS * CELL[1]
    pen.text((14, heading_top + 8), "One person, seen several times:", INK, ImageFont.load_default(size=FONT_SIZE + 3))
    for number, record in enumerate(cells):
        place = number if number < count else number - count + first_of_last
        x, y = place % COLUMNS * CELL[0], place // COLUMNS * CELL[1] + (2 * LINE if number >= count else 0)
        photo = read_image(record.image_path)
        large = photo.resize((photo.width * ZOOM, photo.height * ZOOM), Image.Resampling.BICUBIC)
        sheet.paste(large, (x + (CELL[0] - large.width) // 2, y + 8))
        pen.multiline_text((x + 12, y + large.height + 14), textwrap.fill(record.captions[0], 31), INK, font)
    return sheet


def small_png(sheet: Image.Image) -> bytes:
    """Encode the sheet as a palette PNG with as many colours as `MAX_BYTES` allows."""
    data = b""
    for colors in (256, 128, 64, 32, 16):
        buffer = io.BytesIO()
        sheet.quantize(colors, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
        data = buffer.getvalue()
        if len(data) < MAX_BYTES:
            break
    return data


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--root", type=expand, default=Path("data"), help="data root; the data set is rendered there if it is missing"
    )
    parser.add_argument("--out", type=expand, default=Path("docs/synthetic.png"), help="PNG file to write")
    parser.add_argument("--count", type=int, default=8, help="number of people with one image")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the choice")
    with exit_on_user_error():
        options = parser.parse_args(arguments)
        if options.seed < 0:
            raise ConfigError(f"--seed: must be at least 0, got {options.seed}")
        try:
            sheet = paint_sheet(render_dataset(options.root), options.count, options.seed)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with naming(options.out):
                options.out.write_bytes(small_png(sheet))
        except OSError as error:
            raise ConfigError(
                f"{error.filename}: cannot be written ({error.strerror}); choose another --root or --out"
            ) from None
        print(f"{options.out}: {options.out.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
