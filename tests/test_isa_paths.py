"""The AVX-VNNI, AVX-512, AMX and NEON kernel families, on a machine that need not have them.

Those of x86 run in a build whose instructions are emulated (native_emulation/); NEON in a real
AArch64 build under qemu, where both are installed. The families promise more than closeness:
integer and fp32 products have the same bits in avx2, avxvnni, avx512 and amx, tiles or not; but for
those with our own int8, whose inputs avx2 rounds in its own way.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import native_builds
import numpy as np
import pytest
import test_native
import test_native_matmul
from step_batches import Row, step_batch
from test_native import PROMPTS, all_logits, blocks_of
from test_native_matmul import DTYPES, aligned_tensor, is_whole, packed_tensor
from tiny_models import tiny_artifact

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.workers.artifact.artifact import Artifact, Tensor
from furiosa_llm.workers.artifact.packing import pack_quantized
from furiosa_llm.workers.artifact.quantize import QuantizedRows
from furiosa_llm.workers.artifact.rotation import hadamard
from furiosa_llm.workers.artifact.sizes import scale_group
from furiosa_llm.workers.kernels import native, native_library
from furiosa_llm.workers.kernels.native import NativeExecutor
from furiosa_llm.workers.kernels.reference import ReferenceExecutor

EMULATED = ("avxvnni", "avx512", "amx")
# Below, at and above the rows of a register tile (6 or 8) and an AMX tile (16), and what is left.
# From 65 on AMX multiplies four blocks of 16 side by side, and then one to three.
NUM_ROWS = (1, 2, 3, 5, 8, 12, 15, 16, 17, 21, 22, 31, 48, 70, 96, 111)


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = native_builds.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    if platform.machine() != "x86_64" or "avx2" not in native_library.available_isas():
        pytest.skip("the emulated families need AVX2 for all but their wide registers")
    return native_builds.build_emulated(compiler, tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulated(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything native runs on the emulating build."""
    loaded = native_library.load_library(emulated_library)
    monkeypatch.setattr(native_library, "library", lambda: loaded)
    monkeypatch.setattr(native, "library", lambda: loaded)


def random_tensor(dtype: str, rows: int, cols: int) -> Tensor:
    values = np.random.default_rng(rows * cols).standard_normal((rows, cols))
    return packed_tensor(values.astype(np.float32), dtype)


def random_inputs(rows: int, cols: int) -> np.ndarray:
    x = np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32)
    x[rows // 2, :32] = 0
    return x


def exact_tensor(dtype: str, q: np.ndarray) -> Tensor:
    """Integers with scales that are powers of two, so that every sum is exact in float32."""
    kind, _, variant = dtype.partition("-")
    rotated = variant == "rotated"
    groups = q.shape[1] // scale_group(q.shape[1], kind, rotated)
    scales = 2.0 ** (np.arange(q.shape[0] * groups).reshape(len(q), groups) % 3)
    mins = -5.0 * scales if variant == "min" else None
    blocks = QuantizedRows(
        q.astype(np.int8 if kind in ("int8", "int6") else np.uint8),
        scales.astype(np.float16),
        None if mins is None else mins.astype(np.float16),
        rotated,
        bits=6 if kind == "int6" else 8,
    )
    if kind == "nested4":  # every factor, and the shifts that still give an int8
        factors = (np.arange(q.size // 32).reshape(len(q), -1) % 15 + 1).astype(np.uint8)
        low, high = 8 * factors.astype(int) - 128, 127 - 7 * factors.astype(int)
        shifts = np.where(np.arange(len(q))[:, None] % 2 == 0, low, high).astype(np.int8)
        blocks = replace(blocks, factors=factors, shifts=shifts)
    return aligned_tensor(
        kind, pack_quantized(blocks), q.shape, has_min=mins is not None, rotated=rotated
    )


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("isa", ["avx2", *EMULATED])
@pytest.mark.parametrize(
    ("dtype", "cols"),
    [
        (dtype, cols)
        for dtype in (
            "int8",
            "int8-rotated",
            "int6-rotated",
            "int4",
            "int4-min",
            "nested4",
            "nested4-rotated",
        )
        for cols in (96, 128, 192)
        if is_whole(dtype, cols)
    ],
)
@pytest.mark.parametrize("num_rows", [48, 70])
def test_integer_sums_are_exact(isa: str, dtype: str, cols: int, num_rows: int) -> None:
    random = np.random.default_rng(7)
    ranges = {"int8": (-128, 128), "int6": (-32, 32)}
    low, high = ranges.get(dtype.partition("-")[0], (0, 16))
    q = random.integers(low, high, (40, cols))
    q[:2], q[2:4] = low, high - 1  # what saturates first
    tensor = exact_tensor(dtype, q)
    # The largest of each group is such that its scale is 1, and its quants are these numbers.
    if isa == "avx2" and dtype == "int8-rotated":  # the largest pair
        inputs = random.integers(-63, 64, (num_rows, cols))
        inputs[3], inputs[4] = 63, -63
        inputs[3:5, 1::2] += np.sign(inputs[3:5, 1::2])
        inputs[:, ::32], inputs[:, 1::32] = 127, 0
    else:
        inputs = random.integers(-127, 128, (num_rows, cols))
        inputs[3], inputs[4] = 127, -127
        inputs[:, ::32] = 127
    x = inputs.astype(np.float32)

    y = native.matmul(tensor, hadamard(x) / 32 if tensor.rotated else x, isa=isa)

    weights = tensor.unpack()
    if tensor.rotated:  # what is multiplied is the transform of the inputs, divided by 8
        y, weights = y * 8, hadamard(weights) / 4
    assert np.array_equal(y, inputs @ weights.T.astype(np.int64))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("isa", EMULATED)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (dtype, shape)
        for shape in [(16, 32), (37, 160), (37, 192), (16, 384)]
        for dtype in DTYPES
        if is_whole(dtype, shape[1])
    ],
)
def test_products_are_right(isa: str, dtype: str, shape: tuple[int, int]) -> None:
    test_native_matmul.test_matmul_is_the_product(isa, dtype, shape)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_families_agree_bit_for_bit(dtype: str, num_rows: int) -> None:
    # amx sums bf16 in its tiles' own order
    families = [isa for isa in EMULATED if isa != "amx"] if dtype == "bf16" else EMULATED
    check_agreement(dtype, num_rows, families)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "bf16"])
def test_families_of_this_cpu_agree_bit_for_bit(dtype: str, num_rows: int) -> None:
    check_agreement(dtype, num_rows, families_of_this_cpu())


def test_families_of_this_cpu_agree_where_the_last_block_of_rows_is_small() -> None:
    """1,025 rows are eight blocks of 128 and one row, which is quantised for what few rows read."""
    tensor, x = random_tensor("nested4", 40, 192), random_inputs(1025, 192)
    expected = native.matmul(tensor, x, isa="avx2")
    for isa in families_of_this_cpu():
        assert np.array_equal(native.matmul(tensor, x, isa=isa), expected)


def families_of_this_cpu() -> list[str]:
    """Of those that are emulated elsewhere; without any the test is skipped."""
    present = [isa for isa in EMULATED if isa in native_library.available_isas()]
    if not present:
        pytest.skip("this CPU has no VNNI")
    return present


def check_agreement(dtype: str, num_rows: int, isas: Sequence[str]) -> None:
    first, *isas = isas if dtype == "int8" else ["avx2", *isas]
    if not isas:
        pytest.skip("of the families whose inputs of int8 weights are alike, this CPU has one")
    for shape in [(40, 96), (7, 160), (21, 128), (40, 192), (19, 384)]:
        if not is_whole(dtype, shape[1]):
            continue
        tensor, x = random_tensor(dtype, *shape), random_inputs(num_rows, shape[1])
        expected = native.matmul(tensor, x, isa=first)
        for isa in isas:
            assert np.array_equal(native.matmul(tensor, x, isa=isa), expected)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("isa", EMULATED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_rows(isa: str, dtype: str) -> None:
    tensor, x = random_tensor(dtype, 40, 384), random_inputs(111, 384)
    whole = native.matmul(tensor, x, isa=isa)
    for count in NUM_ROWS:
        assert np.array_equal(native.matmul(tensor, x[:count], isa=isa), whole[:count])
        assert np.array_equal(native.matmul(tensor, x[-count:], isa=isa), whole[-count:])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("isa", EMULATED)
@pytest.mark.parametrize("cols", [2, 30, 34, 70])
def test_floats_in_columns_that_fill_no_tile(isa: str, cols: int) -> None:
    for dtype in ("fp32", "bf16"):
        tensor, x = random_tensor(dtype, 33, cols), random_inputs(21, cols)
        y = native.matmul(tensor, x, isa=isa)
        weights = tensor.unpack()
        inputs = test_native_matmul.rounded_as_kernels_do(x, tensor, isa).astype(np.float64)
        np.testing.assert_allclose(y, inputs @ weights.T, rtol=1e-4, atol=1e-4)
        assert np.array_equal(native.matmul(tensor, x[:5], isa=isa), y[:5])


def run_model(
    artifact: Artifact,
    isa: str,
    kv_cache_dtype: str = "bf16",
    *,
    chunk: int = 128,
    together: bool = True,
    num_pes: int = 2,
) -> np.ndarray:
    executor = NativeExecutor(
        artifact,
        num_blocks=64,
        block_size=16,
        kv_cache_dtype=kv_cache_dtype,
        cpus=((),) * num_pes,
        max_num_batched_tokens=256,
        isa=isa,
    )
    logits = all_logits(executor, chunk, together, 16)
    executor.close()
    return logits


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("isa", EMULATED)
@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("int8", {}),
        ("int4", {}),
        # AMX attends in tiles where heads have multiples of 32 dimensions.
        ("fp32", {"head_dim": 96}),
        ("int8", {"head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1}),
    ],
)
def test_a_model_gives_the_same_logits_however_it_is_run(
    tmp_path: Path, isa: str, weights: str, options: dict[str, int]
) -> None:
    artifact = tiny_artifact(tmp_path, "llama", weights, **options)
    together = run_model(artifact, isa, chunk=128, together=True, num_pes=2)
    in_parts = run_model(artifact, isa, chunk=19, together=False, num_pes=1)
    assert np.array_equal(in_parts, together)
    if weights == "fp32" or (weights == "bf16" and isa != "amx"):
        for kv_cache_dtype in ("fp32", "int8"):  # families differ with a bf16 cache alone
            ours, avx2 = (run_model(artifact, name, kv_cache_dtype) for name in (isa, "avx2"))
            assert np.array_equal(ours, avx2)
    cache = {"num_blocks": 64, "block_size": 16, "kv_cache_dtype": "bf16"}
    near = all_logits(ReferenceExecutor(artifact, **cache), 128, True, 16)
    bounds = test_native.logits_bounds(weights, "bf16", isa, artifact.config.head_dim)
    difference = np.abs(near - together)
    assert difference.max() < bounds[0]
    assert difference.mean() < bounds[1]


@pytest.mark.parametrize("heads", [{}, {"head_dim": 96}, test_native.THREE_HEADS])
def test_families_of_this_cpu_attend_to_an_int8_cache_alike(
    tmp_path: Path, heads: dict[str, int]
) -> None:
    artifact = tiny_artifact(tmp_path, "llama", "fp32", **heads)
    expected = run_model(artifact, "avx2", "int8")
    for isa in families_of_this_cpu():
        assert np.array_equal(run_model(artifact, isa, "int8"), expected)


@pytest.mark.usefixtures("emulated")
def test_steps_of_an_emulated_family_sample(tmp_path: Path) -> None:
    executor = NativeExecutor(
        tiny_artifact(tmp_path, "llama", "int4"),
        num_blocks=64,
        block_size=16,
        kv_cache_dtype="fp32",
        cpus=((),),
        max_num_batched_tokens=256,
        isa="amx",
    )
    batch = step_batch([Row(0, p, blocks_of(i)) for i, p in enumerate(PROMPTS)])
    expected = executor.logits(batch).argmax(axis=1)
    assert np.array_equal(executor.execute(batch).token_ids, expected)
    assert executor.isa == "amx"
    executor.close()


def test_a_family_of_another_cpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    isas = native_library.available_isas()
    assert isas[-1] == "portable"
    for isa in set(native_library.KNOWN_ISAS) - set(isas):
        monkeypatch.setenv("FURIOSA_SERVE_ISA", isa)
        with pytest.raises(InvalidRequestError) as caught:
            native_library.resolve_isa()
        assert f"'{isa}', which this CPU cannot run: this CPU has {isas[0]}" in str(caught.value)
    monkeypatch.setenv("FURIOSA_SERVE_ISA", "avx3")
    with pytest.raises(InvalidRequestError, match="'avx3', which is no kernel family"):
        native_library.resolve_isa()


@pytest.mark.slow
def test_neon_agrees_with_portable(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    program = tmp_path / "check_neon"
    sources = [native_builds.EMULATION / "check_neon.cpp"]
    sources += [native_builds.NATIVE / f"{x}.cpp" for x in ("kernels_neon", "kernels_portable")]
    sources.append(native_builds.NATIVE / "matrix.cpp")
    objects = native_builds.compile_all(compiler, tmp_path, sources)
    command = [compiler, "-static", *objects, "-o", str(program)]
    subprocess.run(command, check=True, timeout=100)
    done = subprocess.run(
        [emulator, "-cpu", "max", str(program)], stdout=subprocess.PIPE, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout
    assert "all checks passed" in done.stdout
