"""A step of the native kernel allocates nothing: all of its memory was reserved with the engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_artifact

SOURCE = Path(__file__).parent / "count_allocations.c"

# What runs under the counting library: it prints the allocations of the steps of three batches.
SCRIPT = """
import ctypes, sys
from pathlib import Path
from step_batches import Row, Sampling, step_batch
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.kernels import native
from furiosa_llm.workers.kernels.native_library import FsMessage

cpus = ((0,), ()) if len(sys.argv) > 3 else ((), ())
executor = native.NativeExecutor(
    Artifact.open(Path(sys.argv[1])), num_blocks=64, block_size=16, kv_cache_dtype="int8",
    cpus=cpus, max_num_batched_tokens=400,
)
count = ctypes.CDLL(sys.argv[2]).count_allocations
count.restype = ctypes.c_long
sampled = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=3, history=[1, 2], num_logprobs=2,
                   repetition_penalty=1.2)
batches = (
    step_batch([Row(0, [7] * 300, range(32))]),
    step_batch([Row(300, [9], range(32))]),
    step_batch([Row(20, [9], [40 + 2 * i, 41 + 2 * i], sampled) for i in range(8)]),
)
for batch in batches:
    result = native._empty_result(batch)
    structs = native._batch_struct(batch), native._result_struct(result), FsMessage()
    arguments = (
        executor._library.fs_engine_step, ctypes.c_void_p(executor._handle),
        *(ctypes.byref(struct) for struct in structs),
    )
    assert count(*arguments, 2) >= 0, structs[2].text
    print(count(*arguments, 20))
"""


@pytest.mark.parametrize("binding", [[], ["bound"]], ids=["unbound", "bound"])
def test_a_step_allocates_nothing(tmp_path: Path, binding: list[str]) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("counting allocations takes a C compiler and glibc")
    library = tmp_path / "libcount.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    artifact = tiny_artifact(tmp_path, "llama", "int8")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, artifact.path, library, *binding],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(SOURCE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["0", "0", "0"]
