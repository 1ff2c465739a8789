"""Every executor against transformers in float32, by stored goldens (goldens/generate.py)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from step_batches import Row, step_batch
from tiny_models import ARCHITECTURES, make_checkpoint

from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.build import build_artifact
from furiosa_llm.workers.executor import Executor
from furiosa_llm.workers.kernels import native_library
from furiosa_llm.workers.kernels.native import NativeExecutor
from furiosa_llm.workers.kernels.reference import ReferenceExecutor

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-3  # on a logit
BLOCK_SIZE = 16
MAX_LEN = 256  # of a sequence here; a whole number of blocks
LOGIT_STRIDE = 97  # as in generate.py

EXECUTORS = ("numpy", *native_library.available_isas())


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / name) as file:
        return dict(file)


TINY = load("tiny.npz")
SMOLLM2 = load("smollm2.npz")
NUM_PROMPTS = sum(name.endswith(".prompt_ids") for name in SMOLLM2)

# All for the best native family; the slow ones decode a few, one of them with a chat template.
PROMPTS_OF = dict.fromkeys(EXECUTORS, (3, 20)) | {EXECUTORS[1]: range(NUM_PROMPTS)}


def make_executor(kind: str, artifact: Artifact, num_sequences: int = 1) -> Executor:
    options: dict[str, Any] = {
        "num_blocks": num_sequences * MAX_LEN // BLOCK_SIZE,
        "block_size": BLOCK_SIZE,
        "kv_cache_dtype": "fp32",
    }
    if kind == "numpy":
        return ReferenceExecutor(artifact, **options)
    return NativeExecutor(artifact, isa=kind, cpus=((), ()), max_num_batched_tokens=4096, **options)


def table_of(sequence: int) -> range:
    return range(sequence * MAX_LEN // BLOCK_SIZE, (sequence + 1) * MAX_LEN // BLOCK_SIZE)


# ---- a tiny model of each architecture ---------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Makes the checkpoint that the goldens were made from, and checks that it is the one."""
    root = tmp_path_factory.mktemp("goldens")

    def artifact_of(architecture: str) -> Artifact:
        out = root / f"{architecture}-artifact"
        if not out.exists():
            checkpoint = make_checkpoint(root / architecture, architecture)
            digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).digest()
            assert digest == TINY[f"{architecture}.sha256"].tobytes(), (
                "tiny_models.py makes other weights than the goldens were made from: run "
                "tests/goldens/generate.py"
            )
            build_artifact(checkpoint, out, weights="fp32")
        return Artifact.open(out)

    return artifact_of


@pytest.mark.parametrize("prompt_len", [40, 200])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", EXECUTORS)
def test_logits_of_every_architecture(tiny_artifact_of, kind, architecture, prompt_len):
    executor = make_executor(kind, tiny_artifact_of(architecture))
    golden = f"{architecture}.{prompt_len}"
    token_ids, positions = TINY[f"{golden}.token_ids"], TINY[f"{golden}.positions"]
    assert len(positions) >= 3
    start = 0
    for position, expected in zip(positions, TINY[f"{golden}.logits"], strict=True):
        chunk = token_ids[start : position + 1].tolist()
        actual = executor.logits(step_batch([Row(start, chunk, table_of(0))]))[0]
        assert np.abs(actual - expected).max() < TOLERANCE
        start = position + 1
    executor.close()


# ---- SmolLM2 -----------------------------------------------------------------------------------


def prompt_of(number: int) -> list[int]:
    return SMOLLM2[f"{number}.prompt_ids"].tolist()


def continuation_of(number: int) -> list[int]:
    return SMOLLM2[f"{number}.new_ids"].tolist()


def assert_logits(number: int, which: int, logits: np.ndarray) -> None:
    """`which` is 0 for the logits of the continuation's first token, 1 for its last one's."""
    largest_ids = SMOLLM2[f"{number}.largest_ids"][which]
    largest = SMOLLM2[f"{number}.largest_logits"][which]
    strided = SMOLLM2[f"{number}.strided_logits"][which]
    assert np.abs(logits[largest_ids] - largest).max() < TOLERANCE
    assert np.abs(logits[::LOGIT_STRIDE] - strided).max() < TOLERANCE


def test_there_are_enough_goldens():
    sys.path.insert(0, str(GOLDENS))
    try:
        from prompts import prompt_texts
    finally:
        sys.path.remove(str(GOLDENS))
    assert len(prompt_texts()) == NUM_PROMPTS >= 20
    assert sum(len(continuation_of(number)) for number in range(NUM_PROMPTS)) > 20 * NUM_PROMPTS


@pytest.mark.slow
def test_the_reference_continues_as_transformers_does(smollm2_artifact):
    """Given the golden tokens so far, each next token is the golden one: by induction that is
    greedy decoding, in one step for each prompt.
    """
    executor = make_executor("numpy", smollm2_artifact("fp32"))
    for number in range(NUM_PROMPTS):
        prompt, continuation = prompt_of(number), continuation_of(number)
        token_ids = [*prompt, *continuation[:-1]]
        logits = executor.all_logits(step_batch([Row(0, token_ids, table_of(0))]))
        logits = logits[len(prompt) - 1 :]
        assert logits.argmax(axis=1).tolist() == continuation
        assert_logits(number, 0, logits[0])
        assert_logits(number, 1, logits[-1])
    executor.close()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "numbers"), PROMPTS_OF.items(), ids=PROMPTS_OF)
def test_greedy_decoding_gives_the_tokens_of_transformers(smollm2_artifact, kind, numbers):
    """All prompts in one batch, token by token."""
    executor = make_executor(kind, smollm2_artifact("fp32"), len(numbers))
    tokens = {number: prompt_of(number) for number in numbers}
    places = {number: place for place, number in enumerate(numbers)}
    num_cached = dict.fromkeys(numbers, 0)
    running = list(numbers)
    while running:
        batch = step_batch(
            [Row(num_cached[n], tokens[n][num_cached[n] :], table_of(places[n])) for n in running]
        )
        sampled = executor.execute(batch).token_ids.tolist()
        for number, token_id in zip(running, sampled, strict=True):
            num_cached[number] = len(tokens[number])
            tokens[number].append(token_id)
        running = [
            n for n in running if len(tokens[n]) < len(prompt_of(n)) + len(continuation_of(n))
        ]
    for number in numbers:
        assert tokens[number] == prompt_of(number) + continuation_of(number)
    executor.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXECUTORS[1:])
def test_native_logits_of_smollm2(smollm2_artifact, kind):
    numbers = PROMPTS_OF[kind]
    executor = make_executor(kind, smollm2_artifact("fp32"), len(numbers))
    for which in (0, 1):
        rows = []
        for place, number in enumerate(numbers):
            prompt, seen = prompt_of(number), continuation_of(number)[:-1]
            cached, token_ids = (len(prompt), seen) if which else (0, prompt)
            rows.append(Row(cached, token_ids, table_of(place)))
        logits = executor.logits(step_batch(rows))
        for place, number in enumerate(numbers):
            assert_logits(number, which, logits[place])
    executor.close()
