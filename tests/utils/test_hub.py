"""The hub is asked once and never waited for; what lies in the cache is read without it."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from utils import hub
from utils.hub import Published, fetch, is_cached, why_silent

NEEDED = Published(
    "model.text.arch", "weights a/b", "a/b", (("model.safetensors", "pytorch_model.bin"), ("config.json",))
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with the network allowed."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


def put(cache: Path, *files: str) -> None:
    """Write files of NEEDED's repository into the cache."""
    folder = cache / "models--a--b"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text("1" * 40)
    for file in files:
        (folder / "snapshots" / ("1" * 40)).mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / ("1" * 40) / file).write_text("{}")


@contextlib.contextmanager
def server(reply: bytes | None) -> Iterator[str]:
    """Address of a server that sends `reply` to everybody, or accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    held.append(connection)
                    if reply is not None:
                        connection.recv(9999)
                        connection.sendall(reply)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_files_in_the_cache_are_found_and_parts_are_not_enough(cache: Path, tmp_path: Path) -> None:
    assert not is_cached(NEEDED)
    put(cache, "pytorch_model.bin")
    assert not is_cached(NEEDED)
    put(cache, "config.json")
    assert is_cached(NEEDED)
    assert is_cached(NEEDED._replace(repo=str(tmp_path)))  # a local folder
    assert not is_cached(NEEDED._replace(repo="no repository at all//"))


def test_a_hub_that_hangs_refuses_or_has_no_name_is_silent_within_seconds(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    monkeypatch.setattr(hub, "PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        refusing = f"http://127.0.0.1:{free.getsockname()[1]}"
    with server(None) as hanging:
        for endpoint in (hanging, refusing, "http://no-such-host.invalid"):
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            start = time.monotonic()
            assert f"{endpoint} does not answer" in str(why_silent())
            assert time.monotonic() - start < 5
            assert why_silent() == why_silent()
    for status, header in (
        ("307 Temporary Redirect", "X-Repo-Commit: 1"),
        ("404 Not Found", "x-error-code: EntryNotFo"),
    ):
        with server(f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: 0\r\n\r\n".encode()) as answering:
            monkeypatch.setattr(constants, "ENDPOINT", answering)
            assert why_silent() is None
    for status in ("200 OK", "302 Found", "404 Not Found", "502 Bad Gateway"):  # of a proxy or a log-in page
        with server(f"HTTP/1.1 {status}\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n".encode()) as portal:
            monkeypatch.setattr(constants, "ENDPOINT", portal)
            assert f"answers {status[:3]}, and not as the hub does" in str(why_silent())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert why_silent() == "HF_HUB_OFFLINE is set"


def test_a_name_server_that_hangs_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr(constants, "ENDPOINT", "http://slow.example")
    monkeypatch.setattr(hub, "get_session", lambda: time.sleep(2))
    assert "does not answer within" in str(why_silent())


@pytest.mark.parametrize("cached, silent, calls", [
    (True, None, [True]), (False, "no network", [True]), (False, None, [False]),
])  # fmt: skip
def test_libraries_read_the_cache_alone_if_it_suffices_or_the_hub_is_silent(
    cached: bool, silent: str | None, calls: list[bool], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached:
        put(cache, "model.safetensors", "config.json")
    monkeypatch.setattr(hub, "why_silent", lambda: silent)
    seen: list[bool] = []
    fetch(NEEDED, lambda: seen.append(constants.HF_HUB_OFFLINE))
    assert seen == calls and not constants.HF_HUB_OFFLINE


def test_a_cache_that_does_not_suffice_is_completed_from_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, "model.safetensors", "config.json")
    seen: list[bool] = []

    def load() -> str:
        seen.append(constants.HF_HUB_OFFLINE)
        if constants.HF_HUB_OFFLINE:
            raise OSError("a shard is missing")
        return "loaded"

    monkeypatch.setattr(hub, "why_silent", lambda: None)
    assert fetch(NEEDED, load) == "loaded" and seen == [True, False]
    monkeypatch.setattr(hub, "why_silent", lambda: "no network")
    with pytest.raises(OSError, match="a shard is missing"):
        fetch(NEEDED, load)
