"""`furiosa-serve doctor` tells a good machine from a bad one, and names the fix."""

import dataclasses
import json
import os
import resource
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from furiosa_llm import doctor
from furiosa_llm.cli.main import main
from furiosa_llm.doctor import Machine, examine


@pytest.fixture(autouse=True)
def home(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="fs-") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The check of the native kernel starts a process; its own tests do so."""
    monkeypatch.setattr(doctor, "_NATIVE_CHECK", "print('avx2 portable')")


@pytest.fixture
def machine(tmp_path):
    """A good one, whose files are the test's to change."""
    proc, sysfs = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "cpuinfo").write_text("model name : Test CPU\nflags : avx2 fma avx512f\n")
    pages = sysfs / "kernel/mm/transparent_hugepage/enabled"
    pages.parent.mkdir(parents=True)
    pages.write_text("always [madvise] never\n")
    return Machine(
        port=0, cache_dir=tmp_path / "cache", sysfs=sysfs, proc=proc, shm=tmp_path, env={}
    )


def found(machine, name):
    return next(finding for finding in examine(machine) if finding.name == name)


def test_a_good_machine(machine):
    findings = list(examine(machine))
    assert len(findings) == len(doctor._CHECKS)
    for finding in findings:
        assert finding.level in ("ok", "warning"), finding
        assert bool(finding.fix) == (finding.level != "ok")
        assert finding.text
    assert machine.cache_dir.is_dir()
    assert found(machine, "cpu").text == "Test CPU: avx2 fma avx512f"
    assert found(machine, "huge pages").text == "transparent huge pages: madvise"


def test_the_port_is_taken(machine):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        finding = found(dataclasses.replace(machine, port=port), "port")
    assert finding.level == "failure"
    assert f"127.0.0.1:{port}" in finding.text
    assert "--port" in finding.fix


def test_the_host_is_no_address(machine):
    finding = found(dataclasses.replace(machine, host="nowhere.invalid"), "port")
    assert finding.level == "failure"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="flags of x86")
def test_no_avx2(machine):
    (machine.proc / "cpuinfo").write_text("model name : Old\nflags : sse2\n")
    finding = found(machine, "cpu")
    assert (finding.level, "portable kernel" in finding.text) == ("warning", True)


def test_huge_pages_are_off(machine):
    (machine.sysfs / "kernel/mm/transparent_hugepage/enabled").write_text("always madvise [never]")
    finding = found(machine, "huge pages")
    assert finding.level == "warning"
    assert "echo madvise" in finding.fix


def test_few_open_files(machine):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, level in ((2000, "warning"), (512, "failure")):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            finding = found(machine, "open files")
            assert (finding.level, finding.text.split()[0]) == (level, str(limit))
            assert "ulimit -n" in finding.fix
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_cache_cannot_be_made(machine, tmp_path):
    (tmp_path / "file").touch()
    finding = found(
        dataclasses.replace(machine, cache_dir=tmp_path / "file/cache"), "cache directory"
    )
    assert finding.level == "failure"
    assert "--cache-dir" in finding.fix
    assert found(dataclasses.replace(machine, cache_dir=None), "cache directory").level == "ok"


def test_little_memory_or_disk(machine, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_MEMORY_BYTES", 1 << 60)
    monkeypatch.setattr(doctor, "MIN_CACHE_BYTES", 1 << 60)
    monkeypatch.setattr(doctor, "MIN_SHM_BYTES", 1 << 60)
    assert found(machine, "memory").level == "failure"
    assert found(machine, "cache directory").level == "warning"
    assert found(machine, "shared memory").level == "warning"


def test_a_quota_of_half_a_core(machine, monkeypatch):
    monkeypatch.setattr(doctor, "cpu_quota", lambda _: 1.5)
    finding = found(machine, "cores")
    assert finding.level == "warning"
    assert "quota of 1.5 CPUs" in finding.text


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param("raise SystemExit('not built')", "not built", id="not built"),
        pytest.param("import os; os.kill(os.getpid(), 4)", "signal 4", id="another CPU's"),
    ],
)
def test_the_native_kernel_does_not_run(machine, monkeypatch, code, reason):
    monkeypatch.setattr(doctor, "_NATIVE_CHECK", code)
    finding = found(machine, "native kernel")
    assert finding.level == "failure"
    assert reason in finding.text
    assert "--backend numpy" in finding.fix


def test_the_native_kernel_runs(machine, monkeypatch):
    monkeypatch.undo()
    finding = found(dataclasses.replace(machine, env=None), "native kernel")
    assert finding.level == "ok"
    assert finding.text.endswith("portable")


def test_no_compiler(machine):
    finding = found(dataclasses.replace(machine, env={"CXX": "no-such-compiler"}), "compiler")
    assert finding.level == "warning"
    assert "no-such-compiler" in finding.text


def test_packages(machine, monkeypatch):
    needed = ["click>=8", "zzz-not-there>=1", "numpy>=999", 'x>=1; extra == "test"']
    monkeypatch.setattr(doctor, "requires", lambda _: needed)
    finding = found(machine, "packages")
    assert finding.level == "failure"
    assert finding.text.startswith("missing: zzz-not-there; too old: numpy ")
    assert sys.executable in finding.fix


def test_variables(machine):
    finding = found(dataclasses.replace(machine, env={"FURIOSA_SERVE_PROT": "1"}), "options")
    assert finding.level == "warning"
    finding = found(dataclasses.replace(machine, env={"FURIOSA_SERVE_PORT": "x"}), "options")
    assert finding.level == "failure"


def test_a_runtime_directory_that_is_no_directory(machine, monkeypatch, home):
    (home / "furiosa-serve").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(home / "nowhere"))
    monkeypatch.setattr(
        "furiosa_llm.wire.runtime_directory._candidates", lambda: [home / "furiosa-serve"]
    )
    finding = found(machine, "runtime directory")
    assert finding.level == "failure"
    assert "set XDG_RUNTIME_DIR" in finding.text


def test_the_command(tmp_path):
    arguments = ["doctor", "--port", "0", "--cache-dir", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stdout
    assert "✓ python" in result.stdout

    with socket.create_server(("127.0.0.1", 0)) as other:
        arguments[2] = str(other.getsockname()[1])
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1
        assert "✗ port" in result.stdout
        assert "fix: " in result.stdout
        assert result.stderr == f"1 of {len(doctor._CHECKS)} checks failed\n"
        result = CliRunner().invoke(main, [*arguments, "--json"])
        assert result.exit_code == 1
        levels = {each["name"]: each["level"] for each in json.loads(result.stdout)}
        assert levels["port"] == "failure"
    assert CliRunner().invoke(main, ["doctor", "--port", "x"]).exit_code == 2
