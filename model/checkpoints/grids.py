"""Position grids: the patch grid that a position embedding was trained on, and resizing to another one."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.checkpoints.facts import Facts

Grid = tuple[int, int]  # rows and columns


class PatchGrid(NamedTuple):
    """Patches of a vision tower, as the positions of its embedding have them."""

    grid: Grid
    image_size: tuple[int, int]
    patch: tuple[int, int]  # height and width in pixels
    prefix: int  # positions before the grid (the class token)


def fit_positions(
    position_embedding: Tensor, target: PatchGrid, facts: Facts, image_size: tuple[int, int] | None = None
) -> tuple[Tensor, str | None]:
    """Resize a position embedding to the target's grid; returns it with a remark, None if both grids are known equal.

    Args:
        position_embedding: (1, prefix + n, W) of any grid.
        target: patches of the model.
        facts: facts of the file.
        image_size: `init.image_size`.

    Raises:
        ValueError: the source grid is unknown.
    """
    if position_embedding.ndim != 3 or position_embedding.shape[1] <= target.prefix:
        raise ValueError(f"shape must be (1, positions, width), got {tuple(position_embedding.shape)}")
    source, why = source_grid(position_embedding.shape[1] - target.prefix, target, facts, image_size)
    names = [f"{rows}x{columns}" for rows, columns in (source, target.grid)]
    if source == target.grid:
        return position_embedding, f"{names[0]}, {why}" if why.startswith("assumed") else None
    resized = resize_position_grid(position_embedding, target.grid, target.prefix, source=source)
    return resized, f"{names[0]} ({why}) resized to {names[1]}"


def source_grid(
    positions: int, target: PatchGrid, facts: Facts, image_size: tuple[int, int] | None = None
) -> tuple[Grid, str]:
    """The grid with this number of positions, and its reason; arguments and errors as in `fit_positions`."""
    if image_size is not None:
        grid = grid_of(positions, image_size, target.patch)
        if grid is None:
            raise ValueError(
                f"init.image_size: no stride gives its {positions} positions in images of "
                f"{image_size[0]}x{image_size[1]}"
            )
        return grid, "init.image_size"
    if facts.image_size is not None and (grid := grid_of(positions, facts.image_size, target.patch)):
        return grid, facts.source
    side = math.isqrt(positions)
    square = side * side == positions
    if square and facts.square:
        return (side, side), facts.source
    if positions == math.prod(target.grid):
        return target.grid, "assumed, because the file has as many positions"
    if square:
        return (side, side), "assumed, because its positions form a square"
    if grid := grid_of(positions, target.image_size, target.patch):
        return grid, "assumed, as another stride of model.image.stride gives it"
    raise ValueError(f"{positions} positions do not form a square, so the source grid is unknown")


def resize_position_grid(
    position_embedding: Tensor, grid: Grid, prefix: int = 1, *, source: Grid | None = None
) -> Tensor:
    """Resize the position embedding of a grid: (1, prefix + n, W) -> (1, prefix + rows * columns, W).

    Bilinear, without antialiasing, corners not aligned (anosorae/IRRA@cfc2378:model/clip_model.py:resize_pos_embed).

    Args:
        position_embedding: positions of the source grid, row by row.
        grid: rows and columns wanted.
        prefix: number of positions before the grid, which are kept (the class token).
        source: rows and columns of the source grid; None is a square.

    Raises:
        ValueError: the source grid does not have this number of positions.
    """
    rows, columns = grid
    cls, patches = position_embedding[:, :prefix], position_embedding[:, prefix:]
    if source is None:
        source = (math.isqrt(patches.shape[1]),) * 2
    if math.prod(source) != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} positions do not form a grid of {source[0]}x{source[1]}")
    image = patches.reshape(1, *source, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image.float(), size=(rows, columns), mode="bilinear", align_corners=False)
    return torch.cat([cls, resized.permute(0, 2, 3, 1).flatten(1, 2).to(cls.dtype)], dim=1)


def grid_of(positions: int, image_size: tuple[int, int], patch: tuple[int, int]) -> Grid | None:
    """The grid with this number of positions that some stride gives for images of this size; None without one."""
    for stride in range(1, patch[0] + 1):
        rows, columns = patch_grid(image_size, patch, stride)
        if min(rows, columns) > 0 and rows * columns == positions:
            return rows, columns
    return None


def patch_grid(image_size: tuple[int, int], patch: tuple[int, int], stride: int) -> Grid:
    """Rows and columns of patches in an image; none of them positive if it is smaller than a patch."""
    rows, columns = (1 + (size - edge) // stride for size, edge in zip(image_size, patch, strict=True))
    return rows, columns
