"""Detection of damaged files: a seal in the checkpoints that train.py writes, checksums in others.

A checkpoint is a zip archive. Its seal is the archive comment `sha256:<hash>`, with the hash of everything before it.
Zip archives of other programs hold a CRC-32 of each member, which torch does not check. Other formats hold no checksum;
for them, and for any file, a `FILE.sha256` as `sha256sum FILE > FILE.sha256` writes it is compared if it exists.
"""

import hashlib
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils.errors import CheckpointError
from utils.paths import why_not_a_file

BLOCK = 2**20
SEAL_LENGTH = len("sha256:") + 64
SEAL = re.compile(struct.pack("<H", SEAL_LENGTH) + rb"sha256:([0-9a-f]{64})\Z", re.DOTALL)  # length, then comment
END_OF_ZIP, END_LENGTH = b"PK\x05\x06", 22  # last record of an archive without comment
NO_COMMENT = struct.pack("<H", 0)


def seal(file: IO[bytes]) -> None:
    """Append the seal to an archive without comment; `file` is open for reading and writing."""
    size = file.seek(0, 2) - len(NO_COMMENT)
    file.seek(0)
    digest = _sha256(file, size)
    file.seek(size)
    file.write(struct.pack("<H", SEAL_LENGTH) + f"sha256:{digest}".encode())


def check_intact(path: str | Path) -> None:
    """Raise `CheckpointError` if the file differs from what was written, as far as there is a checksum.

    A missing file passes, and fails in its reader.
    """
    path = Path(path)
    if kind := why_not_a_file(path):
        raise CheckpointError(f"{path}: must be a checkpoint, got {kind}")
    problem = _sidecar_problem(path) or (_archive_problem(path) if zipfile.is_zipfile(path) else None)
    if problem is not None:
        raise CheckpointError(f"{path}: damaged ({problem}); copy it again, or use an earlier checkpoint")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sidecar_problem(path: Path) -> str | None:
    sidecar = path.with_name(f"{path.name}.sha256")
    if not sidecar.is_file():
        return None
    expected = sidecar.read_text(errors="replace").split()[:1]
    return None if expected == [file_hash(path)] else f"its SHA-256 is not the one in {sidecar.name}"


def _archive_problem(path: Path) -> str | None:
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - END_LENGTH - SEAL_LENGTH))
        end = file.read()
        if found := SEAL.search(end):
            file.seek(0)
            intact = _sha256(file, size - SEAL_LENGTH - len(NO_COMMENT)) == found[1].decode()
            return None if intact else "its SHA-256 is not the one that it was sealed with"
    if not end[-END_LENGTH:].startswith(END_OF_ZIP) or not end.endswith(NO_COMMENT):
        return "its end is cut or changed"
    with zipfile.ZipFile(path) as archive:
        member = archive.testzip()
    return None if member is None else f"wrong checksum of {member}"


def _sha256(file: IO[bytes], size: int) -> str:
    """Hash of the next `size` bytes."""
    digest = hashlib.sha256()
    for block in _blocks(file, size):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (block := file.read(min(size, BLOCK))):
        size -= len(block)
        yield block
