"""Ours and llama.cpp side by side: same model, weight type, threads, prompts and lengths.

    python benchmarks/vs_llamacpp.py [--quick] [--models SmolLM2-135M 1B-shaped]
        [--weights int4 int8 bf16 fp32] [--shapes decode-64x4 ...] [--llama-bin DIR]
        [--isa avx2] [--log FILE] [--limit-s SECONDS]

Sets up the peer and the models (llamacpp.py, bench_models.py), then runs ours and theirs in turn,
each run a fresh process, each shape at least three times, and prints medians, spread, ratios and
shares of the limits that it measures between the runs (limits.py). Ours is measured at the level of
theirs (executor_steps.py). llama.cpp runs once with flash attention and once without; the faster
one goes on and counts.

Every run is one line in the log, and what the log holds is not run again: with `--limit-s` a run
stops in time, and the next one goes on. The result file is written once nothing is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comparison
from bench_models import MODELS, our_artifact, peer_gguf
from comparison import SHAPES, Log, Sample, Shape
from limits import CACHE_DIR, measure
from llamacpp import ISA_ARGS, Peer, PeerSetting, find_or_build
from machine import facts, results_path
from other_load import OtherLoad, wait_until_quiet

SETTINGS = (PeerSetting(flash_attention=True), PeerSetting(flash_attention=False))
QUICK = ("decode-64x4", "prefill-512")
EXECUTOR_STEPS = Path(__file__).parent / "executor_steps.py"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the tables."""

    model: str
    weights: str
    shape: Shape


class Runner:
    """Runs what the log lacks, and appends it."""

    def __init__(self, log: Log, peer: Peer, cache_dir: Path, options: argparse.Namespace) -> None:
        self._log, self._peer, self._cache_dir = log, peer, cache_dir
        self._num_threads: int = options.threads
        self._isa: str | None = options.isa
        self._begin_s = time.monotonic()
        self._limit_s: float = options.limit_s
        self._is_any_load_fine: bool = options.busy

    def prepare(self, cells: list[Cell]) -> None:
        """Make every file that the cells need, so that nothing is built between timed runs."""
        for model, weights in dict.fromkeys((cell.model, cell.weights) for cell in cells):
            our_artifact(model, weights, self._cache_dir, self._peer)
            peer_gguf(model, weights, self._cache_dir, self._peer)

    def run(self, cells: list[Cell], repeats: int) -> bool:
        """Whether all is measured now; False: the time limit came first."""
        self._log.add_limits(measure(self._num_threads, seconds=0.25))
        for repeat in range(repeats):
            for cell in cells:
                for side, setting in self._missing(cell, repeat):
                    if not self._has_time(cell, side):
                        return False
                    self._log.add(self._measure(cell, side, setting))
        return True

    def _missing(self, cell: Cell, repeat: int) -> Iterator[tuple[str, PeerSetting | None]]:
        """What to run of the cell's repeat. The first one tries every setting of the peer."""
        samples = self._log.samples_of(cell.model, cell.weights, cell.shape.name)
        if sum(sample.side == "ours" for sample in samples) <= repeat:
            yield "ours", None
        if not cell.shape.has_peer:
            return
        for setting in SETTINGS:
            if not any(sample.setting == setting.name for sample in samples):
                yield "peer", setting
        samples = self._log.samples_of(cell.model, cell.weights, cell.shape.name)
        best = comparison.best_setting(samples)
        if sum(sample.setting == best for sample in samples) <= repeat:
            yield "peer", next(setting for setting in SETTINGS if setting.name == best)

    def _has_time(self, cell: Cell, side: str) -> bool:
        """Whether a run like the last one of its kind would end before the limit."""
        spent_s = time.monotonic() - self._begin_s
        samples = self._log.samples_of(cell.model, cell.weights, cell.shape.name)
        last_s = [sample.elapsed_s for sample in samples if sample.side == side]
        return spent_s + (last_s[-1] if last_s else self._limit_s / 3) <= self._limit_s

    def _measure(self, cell: Cell, side: str, setting: PeerSetting | None) -> Sample:
        if not self._is_any_load_fine and not wait_until_quiet():
            raise SystemExit(
                "other processes keep the machine busy, and figures beside them mean nothing: "
                f"run again when they are gone (the log is {self._log.path}), or with --busy"
            )
        begin_s = time.monotonic()
        with OtherLoad() as other:
            if setting is None:
                figures = self._ours(cell)
            else:
                figures = {"tokens_per_s": self._theirs(cell, setting)}
        sample = Sample(
            model=cell.model,
            weights=cell.weights,
            shape=cell.shape.name,
            side=side,
            setting=setting.name if setting is not None else "",
            figures=figures,
            elapsed_s=time.monotonic() - begin_s,
            other_load=other.cores,
        )
        name = " ".join((cell.model, cell.weights, cell.shape.name, side, sample.setting))
        print(
            f"{name}: {sample.tokens_per_s:.1f} tokens/s, {sample.elapsed_s:.1f} s, other "
            f"processes {other.cores:.2f} cores",
            flush=True,
        )
        return sample

    def _ours(self, cell: Cell) -> dict[str, Any]:
        shape = cell.shape
        asked = {
            "artifact": str(our_artifact(cell.model, cell.weights, self._cache_dir, None)),
            "num_sequences": shape.num_sequences,
            "num_in": shape.num_in,
            "num_out": shape.num_out,
            "num_threads": self._num_threads,
        }
        environment = os.environ | ({"FURIOSA_SERVE_ISA": self._isa} if self._isa else {})
        run = subprocess.run(
            [sys.executable, EXECUTOR_STEPS, json.dumps(asked)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if run.returncode != 0:
            raise SystemExit(f"our run of {asked} failed")
        figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        kind = "decode" if shape.num_out else "prefill"
        return figures | {"tokens_per_s": figures[f"{kind}_tokens_per_s"]}

    def _theirs(self, cell: Cell, setting: PeerSetting) -> float:
        shape, gguf = cell.shape, peer_gguf(cell.model, cell.weights, self._cache_dir, self._peer)
        common: dict[str, Any] = {"num_threads": self._num_threads, "setting": setting}
        if not shape.num_out:
            return self._peer.prefill(gguf, num_tokens=shape.num_in, **common)
        if shape.num_sequences == 1 and shape.num_in >= 1024:
            return self._peer.decode_at_depth(
                gguf, depth=shape.num_in, num_out=shape.num_out, **common
            )
        return self._peer.decode(
            gguf,
            num_sequences=shape.num_sequences,
            num_in=shape.num_in,
            num_out=shape.num_out,
            **common,
        )


def cells_of(options: argparse.Namespace) -> list[Cell]:
    return [
        Cell(model, weights, shape)
        for model in options.models
        for weights in options.weights
        for shape in SHAPES[model]
        if shape.name in (options.shapes or (QUICK if options.quick else [shape.name]))
    ]


def parse_args() -> argparse.Namespace:
    names = sorted({shape.name for shapes in SHAPES.values() for shape in shapes})
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--weights", nargs="+", choices=list(comparison.WEIGHTS), default=list(comparison.WEIGHTS)
    )
    parser.add_argument("--shapes", nargs="+", choices=names, help="default: all")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, once")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument(
        "--isa", choices=[isa for isa in ISA_ARGS if isa], help="what both sides may use of the CPU"
    )
    peer.add_argument("--llama-bin", type=Path, help="a directory of llama.cpp's tools")
    parser.add_argument("--cache-dir", type=Path, default=CACHE_DIR)
    parser.add_argument("--log", type=Path, help="default: in the cache directory, by day")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="stop before that")
    parser.add_argument("--busy", action="store_true", help="measure beside other processes too")
    parser.add_argument("--prepare", action="store_true", help="make all files and stop")
    parser.add_argument("--render", action="store_true", help="only render what the log holds")
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    about = facts()
    day = about["date"].split()[0]
    cache_dir = options.cache_dir.expanduser()
    name = "vs-llamacpp" if options.isa is None else f"vs-llamacpp-{options.isa}"
    log = Log(options.log or cache_dir / f"{name}-{day}.jsonl")
    cells = cells_of(options)
    if not options.render:
        peer = find_or_build(cache_dir, options.llama_bin, options.isa)
        log.about |= about | {"llama.cpp": peer.version()}
        runner = Runner(log, peer, cache_dir, options)
        runner.prepare(cells)
        if options.prepare:
            return
        if not runner.run(cells, 1 if options.quick else options.repeats):
            raise SystemExit(f"the time is up and something is missing: run again with {log.path}")
    report = comparison.render(log)
    print("\n" + report)
    if not options.quick:
        path = results_path(name)
        path.write_text(report, encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
