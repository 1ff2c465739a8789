"""The worker's loop: plain blocking code between its socket, its scheduler and its executor.

One round is: take what the front-end sent, plan and submit as many steps as may be in flight, then
sleep until a message comes or a step ends, and report each ended step in one `Tokens` message.
Everything that decides is in the scheduler. With nothing to run the loop sleeps in `poll` without
a time limit and costs no CPU; it needs none, because the end of its parent is noticed elsewhere
(tether.py).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import zmq

from furiosa_llm.scheduler.config import SchedulerConfig
from furiosa_llm.scheduler.scheduler import Scheduler, SequenceUpdate
from furiosa_llm.wire.codec import MAX_ROWS, clip_text, decode_to_worker, encode
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import (
    FINISH_REASONS,
    Abort,
    Add,
    Added,
    Configure,
    FromWorker,
    Ping,
    Pong,
    Ready,
    Refused,
    Shutdown,
    TokenLogprobs,
    Tokens,
)
from furiosa_llm.workers.admission import fit_to_vocabulary, refusal_of_tokens
from furiosa_llm.workers.executor import Executor, StepResult
from furiosa_llm.workers.step_queue import FinishedStep, InlineSteps, ThreadedSteps

MAX_MESSAGES_PER_ROUND = 1024
"""Taken from the socket before the next step is planned, however many more wait. `Added` names at
most as many sequences."""

MIN_LOGPROB = -9999.0
"""Stands for the log-probability of a token that cannot be sampled: JSON has no infinity."""

assert MAX_MESSAGES_PER_ROUND <= MAX_ROWS

_log = logging.getLogger(__name__)

_CODE_OF_REASON = {reason: code for code, reason in enumerate(FINISH_REASONS)}


class WorkerLoop:
    """Serves one front-end until it says `Shutdown`.

    Args:
        dealer: connected to the front-end; nothing but this loop's messages go over it.
        executor: with its model loaded. An exception of its `execute` ends the loop.
    """

    def __init__(self, configure: Configure, dealer: zmq.Socket[bytes], executor: Executor) -> None:
        self._configure = configure
        self._dealer = dealer
        self._isa = executor.isa
        self._scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=configure.num_blocks,
                block_size=configure.block_size,
                max_model_len=configure.max_model_len,
                max_num_seqs=configure.max_num_seqs,
                max_num_batched_tokens=configure.max_num_batched_tokens,
                max_processing_samples=configure.max_processing_samples,
                queue_limit=configure.npu_queue_limit,
                spare_blocks_ratio=configure.spare_blocks_ratio,
                is_offline=configure.is_offline,
                packing_type=configure.packing_type,
            )
        )
        self._steps = (
            InlineSteps(executor)
            if configure.npu_queue_limit == 1
            else ThreadedSteps(executor, limit=configure.npu_queue_limit)
        )
        self._poller = zmq.Poller()
        self._poller.register(dealer, zmq.POLLIN)
        if self._steps.wakeup_fd is not None:
            self._poller.register(self._steps.wakeup_fd, zmq.POLLIN)
        self._num_sent = 0
        self._num_malformed = 0
        self._is_stopping = False

    def run(self) -> None:
        """Announce the worker and serve until `Shutdown`. Raises: what a step raised."""
        self._send(Ready, pid=os.getpid(), isa=self._isa, num_blocks=self._configure.num_blocks)
        while True:
            self._receive()
            if self._is_stopping:
                return
            while (plan := self._scheduler.plan()) is not None:
                self._steps.submit(plan)
            finished = self._steps.take_finished()
            if finished is None:
                self._poller.poll()  # for a message, or the end of a step in flight
            else:
                self._report(finished)

    # --- from the front-end -----------------------------------------------------------------------

    def _receive(self) -> None:
        """Handle the messages that are there, without waiting for any."""
        added: list[int] = []
        for _ in range(MAX_MESSAGES_PER_ROUND):
            try:
                frames = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                if len(frames) != 1:
                    raise WireError(f"a message of {len(frames)} frames instead of one")
                message = decode_to_worker(frames[0])
            except WireError as error:
                self._drop_malformed(error)
                continue
            match message:
                case Add():
                    self._add(message, added)
                case Abort():
                    for sequence_id in message.sequence_ids:
                        self._scheduler.abort(sequence_id)
                case Ping():
                    self._acknowledge(added)  # a Pong says that all before the Ping is done
                    self._send(Pong, nonce=message.nonce)
                case Shutdown():
                    self._is_stopping = True
        self._acknowledge(added)

    def _acknowledge(self, added: list[int]) -> None:
        if added:
            self._send(Added, sequence_ids=tuple(added))
            added.clear()

    def _add(self, add: Add, added: list[int]) -> None:
        """Hand the sequence to the scheduler and note it in `added`, or answer why not."""
        vocab_size = self._configure.vocab_size
        refusal = refusal_of_tokens(add, vocab_size) or self._scheduler.add(
            add.sequence_id,
            add.token_ids,
            add.num_prompt_tokens,
            fit_to_vocabulary(add.params, vocab_size),
        )
        if refusal is None:
            added.append(add.sequence_id)
        else:
            self._send(
                Refused,
                sequence_id=add.sequence_id,
                error_code=refusal.code,
                message=clip_text(refusal.message),
            )

    def _drop_malformed(self, error: WireError) -> None:
        """Count it, and log the 1st, 2nd, 4th, 8th ...: a flood must not fill the disk."""
        self._num_malformed += 1
        if self._num_malformed.bit_count() == 1:
            _log.warning("dropped malformed message number %d: %s", self._num_malformed, error)

    # --- to the front-end -------------------------------------------------------------------------

    def _report(self, finished: FinishedStep) -> None:
        """Commit a step and say what came of it."""
        scheduler, result = self._scheduler, finished.result
        updates = scheduler.commit(finished.plan.step_id, result.token_ids.tolist())
        self._send(
            Tokens,
            sequence_ids=tuple([update.sequence_id for update in updates]),
            token_ids=tuple([update.token_id for update in updates]),
            finish_codes=tuple([_CODE_OF_REASON[update.finish_reason] for update in updates]),
            logprobs=_logprobs_of(finished, updates),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=scheduler.num_free_blocks,
            num_preemptions=scheduler.num_preemptions,
        )

    def _send(self, make: Callable[..., FromWorker], **fields: Any) -> None:
        """Send the next message. Waits while the front-end leaves too many of them unread."""
        configure = self._configure
        message = make(
            worker_id=configure.worker_id, epoch=configure.epoch, seq=self._num_sent, **fields
        )
        self._dealer.send(encode(message))
        self._num_sent += 1


def _logprobs_of(
    finished: FinishedStep, updates: list[SequenceUpdate]
) -> tuple[tuple[int, TokenLogprobs], ...]:
    """The log-probabilities that were asked for, with the index of their update."""
    sampling = [row.params for row in finished.plan.rows if row.params is not None]
    return tuple(
        (index, _token_logprobs(finished.result, update.row_index, num_top))
        for index, update in enumerate(updates)
        if (num_top := sampling[update.row_index].num_logprobs) >= 0
    )


def _token_logprobs(result: StepResult, row_index: int, num_top: int) -> TokenLogprobs:
    top_token_ids = result.top_token_ids[row_index, :num_top]
    num_top = int((top_token_ids >= 0).sum())  # the rest is padding
    return TokenLogprobs(
        logprob=_finite(float(result.logprobs[row_index])),
        rank=int(result.ranks[row_index]),
        top_token_ids=tuple(top_token_ids[:num_top].tolist()),
        top_logprobs=tuple(map(_finite, result.top_logprobs[row_index, :num_top].tolist())),
    )


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else MIN_LOGPROB
