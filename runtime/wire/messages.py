"""The messages between front-ends and workers.

A worker belongs to the front-end that started it; others may share it (`Attach`). It has a
connection to each, and what it says over one is numbered apart from what it says over another.

Small frozen values. Each says who sends it to whom; `CODE` is its type on the wire (codec.py turns
a message into bytes and back, and checks every field's type and bounds). Everything a worker says
carries its `epoch`, so that what a dead process sent is told from what its successor sends, and a
`seq` that rises by one per message, so that a gap shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from furiosa_llm.scheduler.params import SequenceParams

PROTOCOL_VERSION = 1

FRONT_END_SHIFT = 48
"""A sequence's id holds its front-end's index above this bit: ids of two never meet in a worker."""

MAX_FRONT_ENDS = 1024


def first_sequence_id(front_end: int) -> int:
    """The lowest id of a front-end's sequences; 2**48 of them follow it."""
    return front_end << FRONT_END_SHIFT


def front_end_of(sequence_id: int) -> int:
    """The index of the front-end whose sequence this is."""
    return sequence_id >> FRONT_END_SHIFT


# --- front-end -> worker --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configure:
    """front-end -> worker, once, over the worker's standard input, before any socket exists."""

    CODE: ClassVar[int] = 0x01
    worker_id: int  # index of the data-parallel group
    epoch: int  # +1 at each start of this group's process
    endpoint: str  # the front-end's ROUTER; the worker connects a DEALER to it
    artifact_path: str  # ignored by the mock backend
    backend: str  # "native" | "numpy" | "mock"
    cpus: tuple[tuple[int, ...], ...]  # per PE: CPU ids its thread may use; () leaves it unbound
    kv_cache_dtype: str  # "fp32" | "bf16" | "int8"
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_processing_samples: int
    npu_queue_limit: int
    spare_blocks_ratio: float
    is_offline: bool
    packing_type: str  # "IDENTITY" | "GREEDY"
    vocab_size: int  # of the model; an `Add` with a token outside it is refused
    mock_tokens_per_s: float  # mock backend: steps are paced to this; 0 is as fast as possible


@dataclass(frozen=True, slots=True)
class Add:
    """front-end -> worker: run this sequence. Acknowledged by `Added` or answered by `Refused`.

    A sequence that was moved from another worker carries its tokens so far behind its prompt.
    """

    CODE: ClassVar[int] = 0x02
    sequence_id: int  # never reused while the worker runs; see `first_sequence_id`
    token_ids: tuple[int, ...]  # prompt, then the output so far; int32 bytes on the wire
    num_prompt_tokens: int  # 1 <= it <= len(token_ids)
    params: SequenceParams


@dataclass(frozen=True, slots=True)
class Abort:
    """front-end -> worker: stop these and free their blocks. Unknown ids are no error."""

    CODE: ClassVar[int] = 0x03
    sequence_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ping:
    """front-end -> worker: answered by `Pong` between two steps."""

    CODE: ClassVar[int] = 0x04
    nonce: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """front-end -> worker: leave now. Running sequences are dropped."""

    CODE: ClassVar[int] = 0x05


@dataclass(frozen=True, slots=True)
class Attach:
    """front-end -> worker: serve another front-end, too. Only the one that started it may say so.

    The worker connects to it, now and whenever that connection breaks, and says `Ready`.
    """

    CODE: ClassVar[int] = 0x06
    front_end: int  # from 1; the one that started the worker is 0
    endpoint: str


# --- worker -> front-end --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """worker -> front-end: the model is mapped and the step loop runs. Always seq 0.

    The worker holds nothing of this front-end then.
    """

    CODE: ClassVar[int] = 0x11
    worker_id: int
    epoch: int
    seq: int
    pid: int
    isa: str  # the kernel family in use: "avx2", "portable", "numpy", "mock", ...
    num_blocks: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    """worker -> front-end: it cannot start, and why; the process then exits. Always seq 0."""

    CODE: ClassVar[int] = 0x12
    worker_id: int
    epoch: int
    seq: int
    error_code: str  # see furiosa_llm.errors.to_wire
    message: str


@dataclass(frozen=True, slots=True)
class Added:
    """worker -> front-end: these sequences are in the worker's hands."""

    CODE: ClassVar[int] = 0x13
    worker_id: int
    epoch: int
    seq: int
    sequence_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """worker -> front-end: this sequence can never run here."""

    CODE: ClassVar[int] = 0x14
    worker_id: int
    epoch: int
    seq: int
    sequence_id: int
    error_code: str
    message: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities at one sampled position, of the model's raw logits."""

    logprob: float  # of the sampled token
    rank: int  # of the sampled token, 1 is the likeliest
    top_token_ids: tuple[int, ...]  # likeliest first
    top_logprobs: tuple[float, ...]


FINISH_REASONS = ("", "stop", "length")
"""By code: still running, a stop token was sampled, `max_tokens` or the context's end was met."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker holds now, and what it has done since its process started."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_preemptions: int
    num_steps: int
    num_computed_tokens: int  # of prompts and of answers, those recomputed once more
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """worker -> front-end: the new tokens of one step, all sequences in one message.

    The three tuples run in parallel, in plan order; ids travel as little-endian bytes.
    """

    CODE: ClassVar[int] = 0x15
    worker_id: int
    epoch: int
    seq: int
    sequence_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_codes: tuple[int, ...]  # indices into FINISH_REASONS
    logprobs: tuple[tuple[int, TokenLogprobs], ...]  # (index into the tuples above, its values)
    load: WorkerLoad  # after this step
    step_s: float = 0.0  # how long the executor took
    begun: tuple[tuple[int, float], ...] = ()
    """(sequence_id, how many seconds ago), of this front-end's sequences whose first step began
    since the last `Tokens`. An age and no time of day: the two may be on two machines."""


@dataclass(frozen=True, slots=True)
class Idle:
    """worker -> front-end: aborts have left nothing to run, so that no `Tokens` will tell."""

    CODE: ClassVar[int] = 0x17
    worker_id: int
    epoch: int
    seq: int
    load: WorkerLoad


@dataclass(frozen=True, slots=True)
class Leaving:
    """worker -> front-end: it was told to leave, and does; nothing it held is to blame for that."""

    CODE: ClassVar[int] = 0x18
    worker_id: int
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Pong:
    """worker -> front-end: the loop is alive."""

    CODE: ClassVar[int] = 0x16
    worker_id: int
    epoch: int
    seq: int
    nonce: int


ToWorker = Add | Abort | Ping | Shutdown | Attach
FromWorker = Ready | StartFailed | Added | Refused | Tokens | Idle | Leaving | Pong
Message = Configure | ToWorker | FromWorker
