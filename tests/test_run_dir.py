"""The runtime directory: one process per name, told apart from what dead ones left."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.run_dir import Address, AlreadyRunningError, RunDir, all_running, read_json

ADDRESS = Address(pid=1, model="m", http="http://h:1", socket="", started_s=1.5, is_background=True)

HOLD = """
import sys
from furiosa_llm.run_dir import RunDir
lock = RunDir(sys.argv[1]).lock()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="fs-") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory) / "furiosa-serve"


@pytest.fixture
def holder():
    """A process that holds the name "one" until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, "one"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_it_is_private(home):
    run_dir = RunDir("one")
    assert run_dir.path == home / "one"
    assert stat.S_IMODE(run_dir.path.stat().st_mode) == 0o700
    with run_dir.lock():
        assert stat.S_IMODE(run_dir.pid_file.stat().st_mode) == 0o600
        run_dir.write_address(ADDRESS)
        assert stat.S_IMODE(run_dir.address_file.stat().st_mode) == 0o600


def test_a_directory_that_others_can_enter_is_refused(home):
    path = RunDir("one").path
    path.chmod(0o755)
    with pytest.raises(FuriosaLLMError, match="mode 0755, so that others can enter it"):
        RunDir("one")


def test_a_link_is_refused(home, tmp_path):
    RunDir("one")
    (home / "two").symlink_to(tmp_path)
    with pytest.raises(FuriosaLLMError, match="two is not a directory"):
        RunDir("two")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(home):
    os.chown(RunDir("one").path, 12345, -1)
    with pytest.raises(FuriosaLLMError, match="belongs to user 12345"):
        RunDir("one")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "ä", "x" * 33, None, 7])
def test_names_that_are_no_names(name):
    with pytest.raises(InvalidRequestError, match="is not a daemon's name"):
        RunDir(name)


def test_a_path_too_long_for_a_socket(monkeypatch, tmp_path):
    # The runtime directory itself fits (wire.sockets sees to that), the daemon's own does not.
    base = tmp_path / ("d" * (84 - len(str(tmp_path)) - 1 - len("/furiosa-serve")))
    base.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    assert RunDir("x").path.is_dir()
    with pytest.raises(FuriosaLLMError, match="too long for a socket's path"):
        RunDir("x" * 32)


def test_only_one_holds_a_name(holder):
    run_dir = RunDir("one")
    assert run_dir.running_pid() == holder.pid
    with pytest.raises(AlreadyRunningError, match=f"with pid {holder.pid}") as caught:
        run_dir.lock()
    assert caught.value.pid == holder.pid
    with pytest.raises(AlreadyRunningError):
        run_dir.refuse_if_running()
    with RunDir("two").lock():  # another name is free
        assert [each.name for each in all_running()] == ["one", "two"]
    assert [each.name for each in all_running()] == ["one"]


def test_asking_does_not_disturb(holder):
    """Whoever asks takes no lock, however briefly: a daemon starting then would be refused."""
    run_dir = RunDir("one")
    for _ in range(50):
        assert run_dir.running_pid() == holder.pid
    with RunDir("two").lock():
        assert RunDir("two").running_pid() == os.getpid()


def test_what_a_killed_daemon_left_is_no_daemon(holder):
    run_dir = RunDir("one")
    run_dir.write_address(ADDRESS)
    run_dir.socket.touch()
    run_dir.control.touch()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run_dir.pid_file.read_text() == f"{holder.pid}\n"  # it is still there
    assert run_dir.running_pid() is None
    with run_dir.lock():
        assert run_dir.running_pid() == os.getpid()
        assert run_dir.read_address() is None
        assert not run_dir.socket.exists()
        assert not run_dir.control.exists()


def test_release_leaves_nothing_that_could_mislead():
    run_dir = RunDir("one")
    lock = run_dir.lock()
    run_dir.write_address(ADDRESS)
    lock.release()
    lock.release()
    assert run_dir.running_pid() is None
    assert run_dir.pid_file.read_text() == ""
    assert run_dir.read_address() is None
    run_dir.lock().release()  # free again


def test_a_process_started_meanwhile_does_not_keep_the_name():
    run_dir = RunDir("one")
    lock = run_dir.lock()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        lock.release()
        run_dir.lock().release()
    finally:
        child.communicate(b"\n")


def test_find(holder):
    assert RunDir.find("one").socket == RunDir("one").socket
    with pytest.raises(FuriosaLLMError, match=r"no daemon named two is running \(running: one\)"):
        RunDir.find("two")


def test_the_address(home):
    run_dir = RunDir("one")
    run_dir.write_address(ADDRESS)
    assert run_dir.read_address() == ADDRESS
    for content in ("", "{", "[]", "{}", '{"pid": 1}', "\x00\xff"):
        run_dir.address_file.write_text(content)
        assert run_dir.read_address() is None
    assert read_json(run_dir.path / "nothing") == {}
