"""Each kernel by itself: its speed beside the numpy reference's, and its share of the limit.

    python benchmarks/kernels.py [--threads 1 2] [--seconds 0.2] [--shapes smollm2 llama-1b]

Matrix products and attention take some 95 % of a step. They run on the shapes of SmolLM2-135M and
of Llama-3.2-1B with random values, cut among the threads as a step cuts them, on matrices and
caches that are used in turn so that they come from memory as they do in a step. Bytes are what a
call has to read (weights with their scales; keys and values), operations are its multiplications
and additions. The limits are measured in the same run (limits.py): a call is bound by memory or by
arithmetic, and its share is that of the limit which it is nearer to. FURIOSA_SERVE_ISA picks the
kernel family. Prints a table and writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from limits import Limits, limits_table, measure
from machine import facts, num_cores, results_path, table

from furiosa_llm.workers.artifact.artifact import Tensor
from furiosa_llm.workers.artifact.packing import pack_matrix
from furiosa_llm.workers.artifact.sizes import FLOAT_DTYPES, weight_type
from furiosa_llm.workers.kernels.native_library import resolve_isa
from furiosa_llm.workers.kernels.native_timing import time_attention, time_matmul
from furiosa_llm.workers.kernels.reference_matmul import load_matrix
from furiosa_llm.workers.kernels.reference_ops import attend

# Together more than the last-level cache of most machines, so that each call reads memory.
WORKING_SET_NBYTES = 128 << 20
DTYPES = ("int8", "int6", "nested4", "bf16", "fp32")
KV_DTYPES = ("bf16", "int8", "fp32")
NUM_ROWS = (1, 4, 16, 64, 512)
# (sequences, new tokens of each, context)
ATTENTION = ((1, 1, 4096), (64, 1, 256), (1, 512, 512), (1, 512, 2048))


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides the shapes of its kernels."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs)."""
        q_size = self.num_heads * self.head_dim
        return {
            "qkv": (q_size + 2 * self.num_kv_heads * self.head_dim, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


SHAPES = {
    "smollm2": Shape(576, 1536, 9, 3, 64),
    "llama-1b": Shape(2048, 8192, 32, 8, 64),
}


def aligned(packed: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes."""
    room = np.empty(len(packed) + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + len(packed)] = packed
    return room[start : start + len(packed)]


def matrices_of(rows: int, cols: int, dtype: str) -> list[Tensor]:
    """Copies of one random matrix, as many as fill the working set."""
    values = np.random.default_rng(0).standard_normal((rows, cols), np.float32)
    packed = pack_matrix(values, dtype)
    count = -(-WORKING_SET_NBYTES // len(packed))
    rotated = dtype not in FLOAT_DTYPES
    return [Tensor(dtype, rows, cols, False, rotated, aligned(packed)) for _ in range(count)]


def seconds_of(body: Callable[[], object]) -> float:
    """The faster of two calls: the reference is slow, and what it is for is being right."""

    def once() -> float:
        begin_s = time.perf_counter()
        body()
        return time.perf_counter() - begin_s

    return min(once(), once())


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel on one shape."""

    name: str
    nbytes: float
    operations: float
    seconds: float
    reference_seconds: float | None

    def row(self, limits: Limits, arithmetic: float) -> list[str]:
        gb_per_s = self.nbytes / self.seconds / 1e9
        gop_per_s = self.operations / self.seconds / 1e9
        of_memory, of_arithmetic = gb_per_s / limits.read_gb_per_s, gop_per_s / arithmetic
        share, bound = max((of_memory, "memory"), (of_arithmetic, "arithmetic"))
        faster = (
            "" if self.reference_seconds is None else f"{self.reference_seconds / self.seconds:.0f}"
        )
        return [
            self.name, str(limits.num_threads), f"{1e6 * self.seconds:.1f}", f"{gb_per_s:.1f}",
            f"{gop_per_s:.0f}", f"{100 * share:.0f} % of {bound}", faster,
        ]  # fmt: skip


HEADER = ["kernel", "threads", "us", "GB/s", "GOP/s", "share of limit", "times numpy"]


def matmul_rows(
    name: str, shape: Shape, dtype: str, limits: list[Limits], isa: str, seconds: float
) -> Iterator[list[str]]:
    """The products of one model and weight type."""
    for matrix, (rows, cols) in shape.matrices().items():
        tensors = matrices_of(rows, cols, dtype)
        reference = load_matrix(tensors[0]) if name == "smollm2" else None
        for num_rows in NUM_ROWS:
            x = np.random.default_rng(1).standard_normal((num_rows, cols), np.float32)
            reference_s = None
            if reference is not None and num_rows <= 16:
                reference_s = seconds_of(functools.partial(reference.product, x))
            # Of many rows' time memory is a small part: fewer matrices do.
            used = tensors[: -(-len(tensors) * 16 // max(num_rows, 16))]
            for of in limits:
                elapsed = time_matmul(
                    used, num_rows, num_pes=of.num_threads, isa=isa, min_seconds=seconds
                )
                call = Call(
                    f"{name} {matrix} {dtype}, {num_rows} rows",
                    len(tensors[0].data),
                    2.0 * num_rows * rows * cols,
                    elapsed,
                    reference_s,
                )
                yield call.row(of, of.arithmetic(isa, weight_type(dtype)))


def attention_rows(
    name: str, shape: Shape, kv_dtype: str, limits: list[Limits], isa: str, seconds: float
) -> Iterator[list[str]]:
    """The attention of one model and cache type."""
    head_nbytes = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / shape.head_dim}[kv_dtype]
    for num_sequences, num_tokens, context in ATTENTION:
        nbytes = 2 * num_sequences * context * shape.num_kv_heads * shape.head_dim * head_nbytes
        seen = num_sequences * num_tokens * (context - (num_tokens - 1) / 2)  # causal
        reference_s = None
        if num_sequences == 1 and name == "smollm2" and kv_dtype == "fp32":
            reference_s = reference_attention_s(shape, num_tokens, context)
        for of in limits:
            elapsed = time_attention(
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                kv_cache_dtype=kv_dtype,
                context=context,
                num_sequences=num_sequences,
                num_tokens=num_tokens,
                num_layers=int(-(-WORKING_SET_NBYTES // nbytes)),
                num_pes=of.num_threads,
                isa=isa,
                min_seconds=seconds,
            )
            call = Call(
                f"{name} attention {kv_dtype}, {num_sequences} x {num_tokens} of {context}",
                nbytes,
                4.0 * seen * shape.num_heads * shape.head_dim,
                elapsed,
                reference_s,
            )
            yield call.row(of, of.arithmetic(isa, "fp32"))


def reference_attention_s(shape: Shape, num_tokens: int, context: int) -> float:
    rng = np.random.default_rng(2)
    q = rng.standard_normal((num_tokens, shape.num_heads, shape.head_dim), np.float32)
    keys, values = rng.standard_normal((2, shape.num_kv_heads, context, shape.head_dim), np.float32)
    positions = np.arange(context - num_tokens, context, dtype=np.int32)
    return seconds_of(lambda: attend(q, keys, values, positions, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all cores")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one kernel (default: 0.1)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--weights", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    isa = resolve_isa()
    about = facts() | {"kernels": isa}
    limits = [measure(n, seconds=0.3) for n in options.threads or sorted({1, num_cores()})]
    rows: list[list[str]] = []
    for name in options.shapes:
        shape = SHAPES[name]
        for dtype in options.weights:
            rows += matmul_rows(name, shape, dtype, limits, isa, options.seconds)
        for kv_dtype in KV_DTYPES:
            rows += attention_rows(name, shape, kv_dtype, limits, isa, options.seconds)
    shown = "\n".join(
        [*(f"- {key}: {value}" for key, value in about.items()), "", "Limits, same run:", "",
         limits_table(limits), "", table(HEADER, rows)]
    )  # fmt: skip
    print(shown)
    path = results_path(f"kernels-{isa}")
    path.write_text(f"# Kernels\n\n{shown}\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
