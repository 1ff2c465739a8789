"""Where sockets live, and what the front-end's end of the wire promises."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.wire import runtime_directory as module
from furiosa_llm.wire.runtime_directory import runtime_directory
from furiosa_llm.wire.sockets import (
    bind_router,
    connect_dealer,
    new_endpoint,
    parse_worker_identity,
    remove_endpoint,
    worker_identity,
)


@pytest.fixture
def no_other_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home for everything: no runtime directory is set, and /tmp is out of reach."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(module, "_candidates", lambda: [tmp_path / "sockets"])
    return tmp_path / "sockets"


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_directory_is_private_whatever_the_umask(no_other_place: Path) -> None:
    umask = os.umask(0)
    try:
        assert runtime_directory() == no_other_place
    finally:
        os.umask(umask)
    assert mode_of(no_other_place) == 0o700


def test_the_runtime_directory_of_the_session_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_directory() == tmp_path / "furiosa-serve"


def test_a_directory_that_is_ours_but_open_is_closed(no_other_place: Path) -> None:
    no_other_place.mkdir(mode=0o777)
    no_other_place.chmod(0o777)
    runtime_directory()
    assert mode_of(no_other_place) == 0o700


@pytest.mark.parametrize("kind", ["file", "link", "missing parent"])
def test_what_is_no_directory_of_ours_is_refused(no_other_place: Path, kind: str) -> None:
    if kind == "file":
        no_other_place.touch()
    elif kind == "link":
        (no_other_place.parent / "real").mkdir()
        no_other_place.symlink_to(no_other_place.parent / "real")
    else:
        no_other_place.parent.rmdir()
    with pytest.raises(FuriosaLLMError, match=r"no directory for sockets: .*: set XDG_RUNTIME_DIR"):
        runtime_directory()


def test_a_directory_of_another_user_is_refused(
    no_other_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_other_place.mkdir()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(FuriosaLLMError, match=f"it belongs to user {owner}"):
        runtime_directory()


def test_a_path_too_long_for_a_socket_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setenv("TMPDIR", str(deep))
    endpoint = new_endpoint()
    assert len(os.fsencode(endpoint.removeprefix("ipc://"))) <= 107
    assert str(deep) not in endpoint


def test_an_endpoint_can_be_bound_and_removed(
    no_other_place: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    endpoint = new_endpoint()
    with bind_router(context, endpoint):
        (path,) = no_other_place.iterdir()
        assert path.is_socket()
    assert path.exists(), "closing leaves the file; that is why there is remove_endpoint"
    remove_endpoint(endpoint)
    remove_endpoint(endpoint)
    assert not list(no_other_place.iterdir())


def test_only_old_sockets_that_nobody_listens_on_are_swept(
    no_other_place: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    live = Path(new_endpoint().removeprefix("ipc://"))
    for name in ("old", "young"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as leftover:
            leftover.bind(str(no_other_place / f"{name}.sock"))
    (no_other_place / "old.txt").touch()
    with bind_router(context, f"ipc://{live}"):
        for path in no_other_place.iterdir():
            if path.stem != "young":
                os.utime(path, (0, 0))
        new_endpoint()
        assert {path.name for path in no_other_place.iterdir()} == {
            "young.sock",
            "old.txt",
            live.name,
        }


def test_sending_to_a_worker_that_is_not_there_is_an_error_and_not_a_loss(
    no_other_place: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    with (
        bind_router(context, new_endpoint()) as router,
        pytest.raises(zmq.ZMQError) as caught,
    ):
        router.send_multipart([worker_identity(0, 1), b"lost"], zmq.NOBLOCK)
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_each_epoch_of_a_worker_has_an_address_of_its_own(
    no_other_place: Path, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    endpoint = new_endpoint()
    with (
        bind_router(context, endpoint) as router,
        connect_dealer(context, endpoint, 4, 1) as first,
        connect_dealer(context, endpoint, 4, 2) as second,
    ):
        for epoch, worker in ((1, first), (2, second)):
            worker.send(b"hello")
            assert router.poll(10_000)
            assert router.recv_multipart() == [worker_identity(4, epoch), b"hello"]
        router.send_multipart([worker_identity(4, 2), b"to the second"])
        assert second.poll(10_000)
        assert second.recv() == b"to the second"
        assert not first.poll(0)


@pytest.mark.parametrize(
    ("identity", "parsed"),
    [
        (worker_identity(0, 1), (0, 1)),
        (worker_identity(17, 123456), (17, 123456)),
        (b"", None),
        (b"1", None),
        (b"1.", None),
        (b"1.2.3", None),
        (b"-1.2", None),
        (b"1.2\n", None),
        (b"\x00\x6b\x8b\x45\x67", None),
        (b"1." + b"9" * 200, None),
    ],
)
def test_identities(identity: bytes, parsed: tuple[int, int] | None) -> None:
    assert parse_worker_identity(identity) == parsed
