"""A built wheel holds everything and runs by itself, away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
FOLDERS = ["runtime", "workers", "scheduler"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the unpacked wheel, built from a copy that holds no build products."""
    base = tmp_path_factory.mktemp("wheel")
    tree = base / "tree"
    tree.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", base / "dist", tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (base / "dist").glob("*.whl")
    target = base / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_holds_every_module_and_the_kernel(installed: Path) -> None:
    package = installed / "furiosa_llm"
    mapping = {
        "runtime": package,
        "workers": package / "workers",
        "scheduler": package / "scheduler",
    }
    missing = [
        path.relative_to(ROOT)
        for folder, home in mapping.items()
        for path in (ROOT / folder).rglob("*.py")
        if not (home / path.relative_to(ROOT / folder)).exists()
    ]
    assert missing == []
    assert list(package.glob("workers/kernels/_native*.so"))
    for home in mapping.values():
        assert (home / "py.typed").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["-m", "furiosa_llm", "version"], id="python -m furiosa_llm"),
        pytest.param(
            ["-c", "from furiosa_llm.cli.main import main; main(['version'])"], id="script"
        ),
    ],
)
def test_the_wheel_runs(installed: Path, command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    assert "0.1.0" in done.stdout


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("furiosa-serve")
    done = subprocess.run([script, "version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.1.0" in done.stdout
