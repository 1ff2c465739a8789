"""What vs_llamacpp.py measures and how its log becomes tables. Pure but for the log's file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from limits import Limits, limits_table
from machine import table
from other_load import MAX_CORES

WEIGHTS = ("int4", "int8", "bf16", "fp32")


@dataclass(frozen=True, slots=True)
class Shape:
    """`num_out` steps of one token over prompts of `num_in`; with `num_out` 0 the prompts alone."""

    num_sequences: int
    num_in: int
    num_out: int
    has_peer: bool = True

    @property
    def name(self) -> str:
        if not self.num_out:
            return f"prefill-{self.num_in}"
        return f"decode-{self.num_in}x{self.num_sequences}"

    def bar(self, isa: str) -> float:
        """How many times the peer's speed is wanted."""
        if not self.num_out:
            return 4.0 if isa == "amx" else 2.0
        if self.num_sequences >= 16:
            return 5.0 if isa == "amx" else 3.0
        return 2.0 if self.num_sequences >= 4 else 1.25


def _decodes(*num_sequences: int) -> tuple[Shape, ...]:
    return tuple(Shape(n, length, length) for length in (64, 128) for n in num_sequences)


_PROMPTS = (Shape(1, 512, 0), Shape(1, 2048, 0))
# The random model's batch of 64 stands for the limits alone: the peer takes minutes for it.
SHAPES = {
    "SmolLM2-135M": (*_decodes(1, 4, 16, 64), *_PROMPTS, Shape(1, 4096, 0), Shape(1, 4096, 64)),
    "1B-shaped": (*_decodes(1, 8), Shape(64, 64, 64, has_peer=False), *_PROMPTS),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one side."""

    model: str
    weights: str
    shape: str
    side: str  # ours or peer
    setting: str  # the peer's
    figures: dict[str, Any]  # tokens_per_s, and of ours what executor_steps.py prints
    elapsed_s: float  # of the whole process
    other_load: float  # cores that other processes kept busy meanwhile

    @property
    def tokens_per_s(self) -> float:
        return float(self.figures["tokens_per_s"])


@dataclass(slots=True)
class Log:
    """A file of JSON lines, read when made; what is added is on disk at once."""

    path: Path
    about: dict[str, str] = field(default_factory=dict)
    limits: list[Limits] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "limits" in entry:
                self.limits.append(Limits(**entry["limits"]))
                self.about |= entry["about"]
            else:
                self.samples.append(Sample(**entry["sample"]))

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self._append({"sample": asdict(sample)})

    def add_limits(self, limits: Limits) -> None:
        self.limits.append(limits)
        self._append({"limits": asdict(limits), "about": self.about})

    def samples_of(self, model: str, weights: str, shape: str) -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if (sample.model, sample.weights, sample.shape) == (model, weights, shape)
        ]

    def _append(self, entry: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def best_setting(samples: Iterable[Sample]) -> str:
    """The peer's setting of the highest median."""
    by_setting: dict[str, list[float]] = {}
    for sample in samples:
        if sample.side == "peer":
            by_setting.setdefault(sample.setting, []).append(sample.tokens_per_s)
    return max(by_setting, key=lambda name: statistics.median(by_setting[name]))


def shares(ours: dict[str, Any], tokens_per_s: float, shape: Shape, limits: Limits) -> list[str]:
    """[of the memory bandwidth, of the arithmetic, of it with attention], in percent; a prompt has
    no share of the bandwidth.

    Arithmetic counts matrix products: the time that they would take at the peak of each weight
    type, over the time that passed. With attention, its products count too, at the peak of bf16.
    """
    isa = ours["isa"]
    if shape.num_out:
        steps_per_s = tokens_per_s / shape.num_sequences
        bandwidth = ours["nbytes_per_step"] * steps_per_s / 1e9 / limits.read_gb_per_s
        shown = f"{100 * bandwidth:.0f} %"
        samples_per_token = 1.0
    else:
        shown, samples_per_token = "", 1 / shape.num_in
    least_s = 0.0
    for weights, ops in ours["ops_per_token"].items():
        least_s += ops / 1e9 / limits.arithmetic(isa, weights)
    for weights, ops in ours["ops_per_sample"].items():
        least_s += samples_per_token * ops / 1e9 / limits.arithmetic(isa, weights)
    attention_s = ours["attention_ops_per_token"] / 1e9 / limits.arithmetic(isa, "bf16")
    return [
        shown,
        f"{100 * least_s * tokens_per_s:.0f} %",
        f"{100 * (least_s + attention_s) * tokens_per_s:.0f} %",
    ]


def render(log: Log) -> str:
    """The result file. Raises: SystemExit if the log holds no run yet."""
    if not log.samples:
        raise SystemExit(f"{log.path} holds no run")
    isas = {sample.figures["isa"] for sample in log.samples if sample.side == "ours"}
    about = log.about | {
        "our kernels": ", ".join(sorted(isas)),
        "threads": ", ".join(str(n) for n in sorted({x.num_threads for x in log.limits})),
        "most cores busy with other processes during a run": (
            f"{max(sample.other_load for sample in log.samples):.2f}"
        ),
    }
    parts = [
        "# Beside llama.cpp",
        "\n".join(f"- {name}: {value}" for name, value in about.items()),
        _NOTES,
        "## Limits\n\n" + limits_table(_median_limits(log.limits)),
    ]
    for model in dict.fromkeys(sample.model for sample in log.samples):
        for weights in WEIGHTS:
            rows = _rows(log, model, weights)
            if rows:
                parts.append(f"## {model}, {weights}\n\n" + table(_HEADER, rows))
    return "\n\n".join(parts) + "\n"


_HEADER = [
    "shape", "ours", "slowest – fastest", "theirs", "slowest – fastest", "their setting", "ratio",
    "bar", "of bandwidth", "of arithmetic", "with attention",
]  # fmt: skip
_NOTES = """\
Tokens/s, medians; every run is a fresh process, ours and theirs in turn. decode-LxN: N prompts of
L tokens, then L steps of one token each (decode-4096x1: 64 steps); only the steps are timed.
prefill-L: one prompt of L tokens. Ours are whole steps of the native executor, sampling (greedy)
included, KV in bf16; theirs are llama-batched-bench and llama-bench, which sample nothing, KV in
f16, a KV buffer for each sequence, the faster of flash attention on and off. Of bandwidth: weights
and KV read per step, times steps per second, over the bandwidth below. Of arithmetic: the time
that the matrix products would take at the peak below, over the time taken; with attention, its
products count too, at the peak of bf16 (on AVX2 fp32). A * is a ratio under its bar, a ! a row with
a run beside which other processes kept over a tenth of a core busy."""


def _rows(log: Log, model: str, weights: str) -> list[list[str]]:
    rows = []
    for shape in SHAPES[model]:
        samples = log.samples_of(model, weights, shape.name)
        ours = [sample for sample in samples if sample.side == "ours"]
        if not ours:
            continue
        limits = _median_limits(log.limits)[-1]
        median, spread = _median_and_spread(ours)
        mark = " !" if any(sample.other_load > MAX_CORES for sample in samples) else ""
        row = [shape.name + mark, f"{median:.1f}", spread]
        peers = [sample for sample in samples if sample.side == "peer"]
        if peers:
            setting = best_setting(samples)
            theirs = [sample for sample in peers if sample.setting == setting]
            peer_median, peer_spread = _median_and_spread(theirs)
            ratio, bar = median / peer_median, shape.bar(ours[0].figures["isa"])
            short = " *" if ratio < bar else ""
            row += [f"{peer_median:.1f}", peer_spread, setting, f"{ratio:.2f}{short}", f"{bar:g}"]
        else:
            row += [""] * 5
        rows.append(row + shares(ours[0].figures, median, shape, limits))
    return rows


def _median_and_spread(samples: list[Sample]) -> tuple[float, str]:
    values = [sample.tokens_per_s for sample in samples]
    return statistics.median(values), f"{min(values):.1f} – {max(values):.1f}"


def _median_limits(limits: list[Limits]) -> list[Limits]:
    """One for each number of threads, the medians of all measurements."""
    merged = []
    for num_threads in sorted({of.num_threads for of in limits}):
        same = [of for of in limits if of.num_threads == num_threads]
        merged.append(
            Limits(
                num_threads=num_threads,
                read_gb_per_s=statistics.median(of.read_gb_per_s for of in same),
                gop_per_s={
                    mode: statistics.median(of.gop_per_s[mode] for of in same)
                    for mode in same[0].gop_per_s
                },
            )
        )
    return merged
