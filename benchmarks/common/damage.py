"""Damage to the bytes of a file, as bad disks and broken transfers do it."""

from random import Random

BLOCK = 4096  # bytes of a block of a disk


def flip_bit(data: bytearray, draw: Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def zero_block(data: bytearray, draw: Random) -> None:
    start = draw.randrange(0, len(data), BLOCK)
    data[start : start + BLOCK] = bytes(len(data[start : start + BLOCK]))


def cut(data: bytearray, draw: Random) -> None:
    del data[draw.randrange(len(data)) :]


def move_block(data: bytearray, draw: Random) -> None:
    """Copy a block over another, as a lost write of a disk does."""
    source, target = (draw.randrange(0, len(data) - BLOCK, BLOCK) for _ in range(2))
    data[target : target + BLOCK] = data[source : source + BLOCK]


def append(data: bytearray, draw: Random) -> None:
    data += draw.randbytes(draw.randrange(1, 5000))
