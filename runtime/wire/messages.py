"""The messages between the front-end and its workers.

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
    kv_cache_dtype: str  # "fp32" | "bf16"
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
    sequence_id: int  # unique for the front-end's life; never reused
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


# --- worker -> front-end --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """worker -> front-end: the model is mapped and the step loop runs. Always seq 0."""

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
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_preemptions: int  # since the worker started


@dataclass(frozen=True, slots=True)
class Pong:
    """worker -> front-end: the loop is alive."""

    CODE: ClassVar[int] = 0x16
    worker_id: int
    epoch: int
    seq: int
    nonce: int


ToWorker = Add | Abort | Ping | Shutdown
FromWorker = Ready | StartFailed | Added | Refused | Tokens | Pong
Message = Configure | ToWorker | FromWorker
