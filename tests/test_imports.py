"""The architecture holds: imports point one way, and a worker stays light."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "runtime": "furiosa_llm",
    "workers": "furiosa_llm.workers",
    "scheduler": "furiosa_llm.scheduler",
}

# What each part may import of ours; the longest matching prefix names the part.
ALLOWED = {
    "furiosa_llm.scheduler": ["furiosa_llm.scheduler"],
    "furiosa_llm.workers": [
        "furiosa_llm.workers",
        "furiosa_llm.scheduler",
        "furiosa_llm.wire",
        "furiosa_llm.errors",
    ],
    "furiosa_llm.workers.artifact": ["furiosa_llm.workers.artifact", "furiosa_llm.errors"],
    "furiosa_llm.wire": ["furiosa_llm.wire", "furiosa_llm.scheduler", "furiosa_llm.errors"],
    "furiosa_llm.text": ["furiosa_llm.text", "furiosa_llm.errors"],
    "furiosa_llm": ["furiosa_llm"],
}
FORBIDDEN_TO_RUNTIME = "furiosa_llm.workers"  # but for its leaf library of artifacts:
EXCEPT = "furiosa_llm.workers.artifact"


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found.append((".".join([package, *parts]).removesuffix(".__init__"), path))
    return found


def imports_of(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write from furiosa_llm.x import Y"
            assert node.module is not None
            names.append(node.module)
    return names


@pytest.mark.parametrize(("module", "path"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_point_one_way(module: str, path: Path) -> None:
    part = max((p for p in ALLOWED if under(module, p)), key=len)
    for name in imports_of(path):
        assert name.split(".")[0] not in FOLDERS, f"{name} is a folder; its package is furiosa_llm"
        if not under(name, "furiosa_llm"):
            continue
        assert any(under(name, p) for p in ALLOWED[part]), f"{module} must not import {name}"
        if part == "furiosa_llm":
            assert not under(name, FORBIDDEN_TO_RUNTIME) or under(name, EXCEPT), (
                f"{module} may use {EXCEPT} but not {name}"
            )


HEAVY = ["transformers", "tokenizers", "torch", "click", "jinja2", "rich", "asyncio"]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        pytest.param("furiosa_llm", [*HEAVY, "numpy", "zmq", "msgpack"], id="the root is lazy"),
        pytest.param("furiosa_llm.workers", [*HEAVY, "numpy"], id="workers package"),
        pytest.param("furiosa_llm.workers.loop", HEAVY, id="worker loop"),
        pytest.param("furiosa_llm.workers.kernels.native", HEAVY, id="native executor"),
        pytest.param("furiosa_llm.scheduler.scheduler", [*HEAVY, "numpy", "zmq"], id="scheduler"),
        pytest.param("furiosa_llm.cli.main", ["transformers", "numpy", "zmq"], id="command line"),
        pytest.param(
            "furiosa_llm.engine.async_llm_engine", ["transformers", "torch", "numpy"], id="engine"
        ),
        pytest.param("furiosa_llm.server.daemon", ["transformers", "torch", "numpy"], id="daemon"),
        pytest.param(
            "furiosa_llm.client.client",
            ["asyncio", "numpy", "msgspec", "tokenizers", "jinja2", "furiosa_llm.engine"],
            id="blocking client",
        ),
    ],
)
def test_importing_stays_light(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}; print(*[m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# What a start waits for comes last: each of these takes 30 to 200 ms to import.
SLOW_TO_IMPORT = [
    "asyncio", "numpy", "zmq", "msgpack", "msgspec", "tokenizers", "transformers", "starlette",
    "uvicorn", "uvloop", "yaml", "rich", "jinja2", "prometheus_client", "difflib", "ssl",
    "furiosa_llm.engine.core", "furiosa_llm.server.app", "furiosa_llm.wire.messages",
]  # fmt: skip


def slow_imports_at(stop: str, statement: str, tmp_path: Path) -> list[str]:
    """Which of them a process has imported when `statement` gets to calling `stop`."""
    module, _, name = stop.partition(":")
    owner, _, attribute = name.rpartition(".")
    code = (
        "import sys\n"
        f"import {module} as module\n"
        "def stop(*args, **kwargs):\n"
        f"    print(*[m for m in {SLOW_TO_IMPORT!r} if m in sys.modules])\n"
        "    sys.stdout.flush()\n"
        "    import os; os._exit(77)\n"
        f"setattr(module{'.' + owner if owner else ''}, {attribute!r}, stop)\n"
        f"{statement}\n"
    )
    env = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 77, done.stderr
    return done.stdout.split()


def test_start_spawns_the_daemon_before_anything_slow_is_imported(tmp_path: Path) -> None:
    statement = "from furiosa_llm.cli.main import main; main(['start', 'any-model'])"
    assert slow_imports_at("subprocess:Popen", statement, tmp_path) == []


def test_serve_spawns_the_workers_before_anything_slow_is_imported(tmp_path: Path) -> None:
    statement = (
        "from furiosa_llm.cli.main import main; main(['serve', 'any-model', '--backend=mock'])"
    )
    stop = "furiosa_llm.engine.head_start:FreshWorker.__init__"
    assert slow_imports_at(stop, statement, tmp_path) == []


def test_a_worker_imports_what_it_needs_before_it_is_configured() -> None:
    """And not what it does not: numpy's backend has threads to bind first."""
    code = (
        "import sys, furiosa_llm.wire.pipe as pipe, furiosa_llm.workers.__main__ as worker\n"
        "sys.argv = ['worker', '--backend=' + {!r}]\n"
        "def stop(_):\n"
        "    print(*[m for m in ('numpy', 'furiosa_llm.workers.loop') if m in sys.modules])\n"
        "    raise EOFError\n"
        "worker.read_configure = stop\n"
        "sys.exit(worker.main() != worker.EXIT_NOT_CONFIGURED)\n"
    )
    for backend, expected in (
        ("mock", ["numpy", "furiosa_llm.workers.loop"]),
        ("native", ["numpy", "furiosa_llm.workers.loop"]),
        ("numpy", []),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(backend)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=True,
        )
        assert done.stdout.split() == expected, backend


def test_the_root_resolves_every_public_name() -> None:
    import furiosa_llm

    assert {
        name for name in furiosa_llm.__all__ if getattr(furiosa_llm, name, None) is None
    } == set()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = furiosa_llm.nonsense


def test_nothing_pickles() -> None:
    """A pickle from a socket is code of the sender's choice: none anywhere."""
    guilty = [m for m, path in modules() if {"pickle", "marshal", "shelve"} & set(imports_of(path))]
    assert guilty == []
