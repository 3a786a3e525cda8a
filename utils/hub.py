"""The Hugging Face hub: what its cache has, and whether it answers; asked once, and never waited for."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from utils.errors import first_line

T = TypeVar("T")
TIMEOUT = 4.0  # seconds for a connection, and for an answer
PATIENCE = 6.0  # seconds for both and the look-up of the name, which has no timeout
FILE_SUFFIXES = (".gz", ".txt", ".json", ".safetensors", ".bin", ".pt", ".pth")
PROBE = (
    "/openai/clip-vit-base-patch16/resolve/main/config.json"  # a file to ask for: proxies and log-in pages answer, too
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings tell of every retry


class Published(NamedTuple):
    """Files of a repository on the hub that a config needs."""

    key: str  # option of the config that names them
    what: str  # weights, tokenizer
    repo: str
    files: tuple[tuple[str, ...], ...]  # one of each group is needed


def names_repository(name: str) -> bool:
    """True if a name may be that of a repository; False for a path that can be nothing else."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return Path(name).suffix not in FILE_SUFFIXES


def is_cached(needed: Published) -> bool:
    """True if the files lie in the cache, or the name is a local path."""
    if Path(needed.repo).exists():
        return True
    try:
        return all(any(_path(needed.repo, file) for file in group) for group in needed.files)
    except (HFValidationError, OSError):
        return False


def _path(repo: str, file: str) -> str | None:
    path = try_to_load_from_cache(repo, file)
    return path if isinstance(path, str) else None


def why_silent() -> str | None:
    """Reason why the hub cannot be asked; None if it can."""
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _no_answer(constants.ENDPOINT)


@cache
def _no_answer(endpoint: str) -> str | None:
    answer: list[str | None] = []

    def ask() -> None:
        try:
            reply = get_session().head(f"{endpoint}{PROBE}", timeout=TIMEOUT, follow_redirects=False)
            known = any(name in reply.headers for name in ("X-Repo-Commit", "X-Error-Code"))
            answer.append(None if known else f"{endpoint} answers {reply.status_code}, and not as the hub does")
        except Exception as error:  # of the HTTP library, which differs between versions of the hub's client
            answer.append(f"{endpoint} does not answer: {first_line(error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answer[0] if answer else f"{endpoint} does not answer within {PATIENCE:.0f} seconds"


def fetch(needed: Published, load: Callable[[], T]) -> T:
    """The result of `load`, a library's reader: from the cache if the files are there, or if the hub does not answer.

    Libraries ask the hub for each file, and several times if it does not answer.
    """
    if is_cached(needed) or why_silent():
        with _cache_alone():
            try:
                return load()
            except Exception:
                if Path(needed.repo).exists() or why_silent():
                    raise
    return load()


@contextlib.contextmanager
def _cache_alone() -> Iterator[None]:
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
