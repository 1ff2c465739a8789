"""From engine arguments to small frozen values, one per consumer."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_llm.checks import refuse
from furiosa_llm.engine.attach_ticket import AttachTicket
from furiosa_llm.engine.inputs import InputProcessor
from furiosa_llm.engine.placement import worker_backend, worker_groups
from furiosa_llm.engine.startup import StartupProgress
from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.groups import PEGroup
from furiosa_llm.progress import Progress, console_progress
from furiosa_llm.text.tokenizer import Tokenizer
from furiosa_llm.wire.messages import Configure
from furiosa_llm.workers.artifact.artifact import Artifact
from furiosa_llm.workers.artifact.memory import available_memory_bytes
from furiosa_llm.workers.artifact.resolve import ResolvedModel, resolve_model

if TYPE_CHECKING:
    from furiosa_llm.args import EngineArgs

DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
OFFLINE_MAX_NUM_BATCHED_TOKENS = 8192
DEFAULT_QUEUE_LIMIT = 2
DEFAULT_MAX_PROCESSING_SAMPLES = 65536
DEFAULT_SPARE_BLOCKS_RATIO = 0.2
OFFLINE_SPARE_BLOCKS_RATIO = 0.0
MAX_WAITING_SEQUENCES = 65536
"""Beyond what all workers may hold, this many wait in the front-end; more is refused."""

MIN_MODEL_LEN = 2

KV_SHARE_OF_AVAILABLE = 0.4
"""Of the memory that is available, at most this goes to the KV pools of all workers together."""


MOCK_SPEED_VARIABLE = "FURIOSA_SERVE_MOCK_TOKENS_PER_S"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the front-end needs to run: the model's facts, and how each worker is configured."""

    model: ResolvedModel  # owns the artifact's directory where that is temporary
    inputs: InputProcessor
    weights: str  # the artifact's weight type
    generation: dict[str, Any]  # the checkpoint's own sampling defaults
    workers: tuple[Configure, ...]  # epoch 1; the endpoint is filled in by the core
    devices: tuple[str, ...]  # of each worker, for people to read
    max_processing_samples: int
    max_waiting: int
    tokenizer_dir: str
    tokenizer_mode: str


def resolve_settings(
    args: EngineArgs,
    progress: Progress | None = None,
    startup: StartupProgress | None = None,
) -> EngineSettings:
    """Find or build the model, divide the devices, and size the KV pools.

    Raises: DeviceError, ArtifactError, InvalidRequestError; nothing has been started then.
    """
    groups = worker_groups(args)
    startup = startup or StartupProgress()
    for index, group in enumerate(groups):
        startup.worker(index, str(group), "waiting")
    cache_dir = None if args.cache_dir is None else Path(args.cache_dir)
    with nullcontext(progress) if progress is not None else console_progress() as shown_progress:
        model = resolve_model(
            args.model,
            cache_dir=cache_dir,
            weights=args.weights,
            progress=startup.beside(shown_progress),
        )
    startup.enter("loading tokenizer")
    try:
        return _settings_of(args, groups, model)
    except BaseException:
        if model.temporary is not None:
            model.temporary.cleanup()
        raise


def _settings_of(
    args: EngineArgs, groups: tuple[PEGroup, ...], model: ResolvedModel
) -> EngineSettings:
    artifact = model.artifact
    template = _configure_of(args, artifact, num_workers=len(groups))
    return _settings_for(
        model,
        workers=tuple(
            replace(template, worker_id=index, cpus=group.cpus)
            for index, group in enumerate(groups)
        ),
        devices=tuple(map(str, groups)),
        max_waiting=MAX_WAITING_SEQUENCES,
        tokenizer_dir=str(args.tokenizer or artifact.tokenizer_dir),
        tokenizer_mode=args.tokenizer_mode,
        seed=args.seed,
    )


def settings_of_ticket(ticket: AttachTicket) -> EngineSettings:
    """For an engine that shares another one's workers. Raises: ArtifactError."""
    return _settings_for(
        ResolvedModel(Artifact.open(ticket.workers[0].artifact_path)),
        workers=ticket.workers,
        devices=ticket.devices,
        max_waiting=ticket.max_waiting,
        tokenizer_dir=ticket.tokenizer_dir,
        tokenizer_mode=ticket.tokenizer_mode,
        seed=ticket.seed,
    )


def _settings_for(
    model: ResolvedModel,
    *,
    workers: tuple[Configure, ...],
    devices: tuple[str, ...],
    max_waiting: int,
    tokenizer_dir: str,
    tokenizer_mode: str,
    seed: int | None,
) -> EngineSettings:
    """What follows from how the workers are configured."""
    artifact = model.artifact
    return EngineSettings(
        model=model,
        inputs=InputProcessor(
            tokenizer=Tokenizer.from_directory(tokenizer_dir, tokenizer_mode),
            vocab_size=artifact.config.vocab_size,
            max_model_len=workers[0].max_model_len,
            eos_token_ids=artifact.eos_token_ids,
            engine_seed=seed,
        ),
        weights=artifact.weights,
        generation=dict(artifact.generation),
        workers=workers,
        devices=devices,
        max_processing_samples=workers[0].max_processing_samples,
        max_waiting=max_waiting,
        tokenizer_dir=tokenizer_dir,
        tokenizer_mode=tokenizer_mode,
    )


def _configure_of(args: EngineArgs, artifact: Artifact, *, num_workers: int) -> Configure:
    """What all workers are told, with the place of what each is told for itself."""
    config = artifact.config
    is_offline = bool(args.is_offline)
    kv_cache_dtype = args.kv_cache_dtype
    if kv_cache_dtype == "auto":
        kv_cache_dtype = "fp32" if artifact.weights == "fp32" else "bf16"
    max_model_len = _max_model_len(args.max_model_len, config.max_model_len)
    max_num_seqs = args.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    backend = worker_backend(args)
    if backend == "numpy" and args.backend is None:
        _log.warning("the native kernel was not built: running the slow numpy backend")
    num_blocks = _num_blocks(
        args,
        block_bytes=config.kv_bytes_per_token(kv_cache_dtype) * args.block_size,
        num_usable=max_num_seqs * -(-max_model_len // args.block_size),
        num_workers=num_workers,
        available=None if backend == "mock" else available_memory_bytes(),  # it has no KV cache
    )
    return Configure(
        worker_id=0,
        epoch=1,
        endpoint="ipc://to-be-bound",
        artifact_path=str(artifact.path.resolve()),
        backend=backend,
        cpus=(),
        kv_cache_dtype=kv_cache_dtype,
        num_blocks=num_blocks,
        block_size=args.block_size,
        max_model_len=_fit_to_pool(args, max_model_len, num_blocks),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens
        or (OFFLINE_MAX_NUM_BATCHED_TOKENS if is_offline else DEFAULT_MAX_NUM_BATCHED_TOKENS),
        max_processing_samples=args.max_processing_samples or DEFAULT_MAX_PROCESSING_SAMPLES,
        npu_queue_limit=args.npu_queue_limit or DEFAULT_QUEUE_LIMIT,
        spare_blocks_ratio=_spare_blocks_ratio(args.spare_blocks_ratio, is_offline),
        is_offline=is_offline,
        packing_type=args.packing_type,
        vocab_size=config.vocab_size,
        mock_tokens_per_s=float(os.environ.get(MOCK_SPEED_VARIABLE) or 0),
    )


def _max_model_len(asked: int | None, model_max: int) -> int:
    if asked is not None and not MIN_MODEL_LEN <= asked <= model_max:
        raise refuse(
            "--max-model-len",
            f"{asked} is not from {MIN_MODEL_LEN} to {model_max}, the positions the model was made "
            f"for",
        )
    return asked or model_max


def _num_blocks(
    args: EngineArgs, *, block_bytes: int, num_usable: int, num_workers: int, available: int | None
) -> int:
    """Blocks of one worker's pool: as asked for, else what its load can use, else what there is.

    Args:
        num_usable: what the greatest load would fill.
        available: bytes of memory for the pools of all workers; None: unknown, or of no matter.
    """
    if args.paged_attention_num_blocks is not None:
        flag, num_blocks = "--paged-attention-num-blocks", args.paged_attention_num_blocks
    elif args.kv_cache_memory is not None:
        flag, num_blocks = "--kv-cache-memory", args.kv_cache_memory // block_bytes
        if num_blocks == 0:
            raise refuse(
                flag,
                f"{args.kv_cache_memory} bytes hold no block of {block_bytes} bytes "
                f"({args.block_size} tokens): give at least {block_bytes}",
            )
    elif available is None:
        return num_usable
    else:
        share = int(available * KV_SHARE_OF_AVAILABLE / num_workers)
        return max(1, min(num_usable, share // block_bytes))
    if available is not None and num_workers * num_blocks * block_bytes > available:
        raise refuse(
            flag,
            f"{num_blocks} blocks of {block_bytes} bytes for each of {num_workers} workers are "
            f"{num_workers * num_blocks * block_bytes} bytes of KV cache, but {available} bytes of "
            f"memory are available: give at most {available // num_workers // block_bytes} blocks",
        )
    return num_blocks


def _fit_to_pool(args: EngineArgs, max_model_len: int, num_blocks: int) -> int:
    """The longest context that the pool holds; refused where the caller asked for more."""
    num_tokens = num_blocks * args.block_size
    if num_tokens >= max_model_len:
        return max_model_len
    if num_tokens < MIN_MODEL_LEN:
        raise InvalidRequestError(
            f"{num_blocks} KV blocks of {args.block_size} tokens hold {num_tokens} tokens, and a "
            f"prompt and its answer need at least {MIN_MODEL_LEN}: give more blocks or memory",
            param="paged_attention_num_blocks",
        )
    if args.max_model_len is not None:
        raise InvalidRequestError(
            f"--max-model-len: {max_model_len} tokens need {-(-max_model_len // args.block_size)} "
            f"KV blocks of {args.block_size} tokens but a worker has {num_blocks}: lower it to "
            f"{num_tokens} or give more blocks or memory",
            param="max_model_len",
        )
    _log.warning("the KV pool holds %d tokens: the context is cut to that", num_tokens)
    return num_tokens


def _spare_blocks_ratio(asked: float | None, is_offline: bool) -> float:
    if asked is not None:
        return asked
    return OFFLINE_SPARE_BLOCKS_RATIO if is_offline else DEFAULT_SPARE_BLOCKS_RATIO
