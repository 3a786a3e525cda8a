"""Kinds of files by their first bytes: what a file of weights is not, and what to do about it."""

import re
import zipfile
from pathlib import Path

from utils.errors import CheckpointError

MOST_TEXT = 512
GET_THE_FILE = "download the file itself"
# (pattern of the first bytes, what the file is, what to do)
PACKED: tuple[tuple[bytes, str, str], ...] = (
    (rb"\s*\Z", "the file is empty", "download or copy it again"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with git lfs pull"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head|!--)", "an HTML page, not the file itself", GET_THE_FILE),
    (rb"(\xef\xbb\xbf)?\s*<(\?xml|error)", "an XML page, not the file itself", GET_THE_FILE),
    (rb"\x1f\x8b", "compressed by gzip", "unpack it first"),
    (rb"BZh[1-9]|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!", "a compressed archive", "unpack it first"),
    (rb"(?s).{257}ustar", "a tar archive", "unpack it first"),
)
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    *PACKED,
    (rb"\x80[\x04\x05]", "a pickle that torch.save did not write", "write its state dict with torch.save"),
    (rb"GGUF", "weights of llama.cpp (GGUF)", "use weights of torch or safetensors"),
    (rb"\x89HDF", "an HDF5 file", "use weights of torch or safetensors"),
    (rb"\x93NUMPY", "a NumPy array", "use weights of torch or safetensors"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|%PDF", "an image or a document", GET_THE_FILE),
)


def first_bytes(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MOST_TEXT)


def check_signature(path: str | Path, *, text: bool = False) -> None:
    """Raise `CheckpointError` for a file that holds no weights by its first bytes; `text` accepts text files."""
    start = first_bytes(path)
    for pattern, what, advice in SIGNATURES:
        if re.match(pattern, start, re.IGNORECASE):
            raise CheckpointError(f"{path}: damaged, or no checkpoint ({what}); {advice}")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise CheckpointError(f"{path}: damaged, or no checkpoint (a zip archive without weights); unpack it first")
    elif not text and _is_text(start):
        words = " ".join(start.decode(errors="replace").split())[:40]
        raise CheckpointError(f"{path}: damaged, or no checkpoint (a text file, '{words}'); {GET_THE_FILE}")


def is_safetensors(path: str | Path) -> bool:
    """True for a file that begins as safetensors do: the length of a header, then a JSON mapping."""
    start = first_bytes(path)
    length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and 2 <= length <= Path(path).stat().st_size - 8


def _is_text(start: bytes) -> bool:
    """True for printable characters alone, of the length of a word at least."""
    return len(start) >= 8 and all(byte >= 32 or byte in b"\t\n\r" for byte in start) and _decodes(start)


def _decodes(start: bytes) -> bool:
    try:
        start[:-4].decode()  # the last letter may be cut
    except UnicodeDecodeError:
        return False
    return True
