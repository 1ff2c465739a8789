"""The worker's loop: plain blocking code between its sockets, its scheduler and its executor.

One round is: take what front-ends sent, plan and submit as many steps as may be in flight, then
sleep until a message comes or a step ends, and report each ended step in one `Tokens` message (to
each front-end that has rows in it).
Everything that decides is in the scheduler. With nothing to run the loop sleeps in `poll` without
a time limit and costs no CPU; it needs none, because the end of its parent is noticed elsewhere
(tether.py).
"""

from __future__ import annotations

import logging
import math
import os
import time

import zmq

from furiosa_llm.scheduler.config import SchedulerConfig
from furiosa_llm.scheduler.refusal import Refusal
from furiosa_llm.scheduler.scheduler import Scheduler, SequenceUpdate
from furiosa_llm.wire.codec import MAX_ROWS, clip_text
from furiosa_llm.wire.messages import (
    FINISH_REASONS,
    Abort,
    Add,
    Added,
    Attach,
    Configure,
    Idle,
    Leaving,
    Ping,
    Pong,
    Ready,
    Refused,
    Shutdown,
    TokenLogprobs,
    Tokens,
    WorkerLoad,
    front_end_of,
)
from furiosa_llm.workers.admission import fit_to_vocabulary, refusal_of_tokens
from furiosa_llm.workers.executor import Executor, StepResult
from furiosa_llm.workers.first_steps import FirstSteps
from furiosa_llm.workers.link import AttachedLink, FrontEndLink
from furiosa_llm.workers.step_queue import FinishedStep, InlineSteps, ThreadedSteps

MAX_MESSAGES_PER_ROUND = 1024
"""Taken from a front-end before the next step is planned, however many more wait. `Added` names at
most as many sequences."""

MIN_LOGPROB = -9999.0
"""Stands for the log-probability of a token that cannot be sampled: JSON has no infinity."""

assert MAX_MESSAGES_PER_ROUND <= MAX_ROWS

_log = logging.getLogger(__name__)

_CODE_OF_REASON = {reason: code for code, reason in enumerate(FINISH_REASONS)}


class WorkerLoop:
    """Serves the front-end that started it until that says `Shutdown`, and those attached to it.

    Args:
        link: to the front-end that started the worker.
        executor: with its model loaded. An exception of its `execute` ends the loop.
    """

    def __init__(self, configure: Configure, link: FrontEndLink, executor: Executor) -> None:
        self._configure = configure
        self._owner = link
        self._attached: dict[int, AttachedLink] = {}  # by the front-end's index
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
        self._poller.register(link.dealer, zmq.POLLIN)
        if self._steps.wakeup_fd is not None:
            self._poller.register(self._steps.wakeup_fd, zmq.POLLIN)
        self._num_steps = self._num_computed_tokens = self._num_output_tokens = 0
        self._first_steps = FirstSteps()
        self._is_idle_known = True  # whether the last load that was sent is that of an idle worker
        self._is_stopping = False

    def run(self) -> None:
        """Announce the worker and serve until `Shutdown`. Raises: what a step raised."""
        self._announce(self._owner)
        while True:
            self._receive()
            if self._is_stopping:
                self._leave()
                return
            while (plan := self._scheduler.plan()) is not None:
                self._steps.submit(plan)
            finished = self._steps.take_finished()
            if finished is None:
                self._report_idle()
                self._poller.poll()  # for a message, or the end of a step in flight
            else:
                self._report(finished)

    # --- front-ends -------------------------------------------------------------------------------

    @property
    def _links(self) -> list[FrontEndLink]:
        return [self._owner, *self._attached.values()]

    def _announce(self, link: FrontEndLink) -> None:
        link.send(Ready, pid=os.getpid(), isa=self._isa, num_blocks=self._configure.num_blocks)

    def _attach(self, attach: Attach) -> None:
        """Serve this front-end, too; in the place of one that had its index before."""
        self._detach(attach.front_end)
        context = self._owner.dealer.context
        link = self._attached[attach.front_end] = AttachedLink(self._configure, context, attach)
        self._poller.register(link.dealer, zmq.POLLIN)
        self._poller.register(link.monitor, zmq.POLLIN)
        self._announce(link)

    def _detach(self, front_end: int) -> None:
        """Drop all that this front-end has here."""
        link = self._attached.pop(front_end, None)
        if link is None:
            return
        for sequence_id in self._scheduler.sequence_ids:
            if front_end_of(sequence_id) == front_end:
                self._drop(sequence_id)
        self._first_steps.take(front_end, 0.0)  # of sequences that have ended since
        self._poller.unregister(link.dealer)
        self._poller.unregister(link.monitor)
        link.close()

    def _leave(self) -> None:
        for link in self._links:
            link.send(Leaving)
        for front_end in list(self._attached):
            self._detach(front_end)

    # --- from the front-ends ----------------------------------------------------------------------

    def _receive(self) -> None:
        """Handle the messages that are there, without waiting for any."""
        for attached in list(self._attached.values()):
            if attached.has_vanished():
                self._attach(attached.attach)
        for link in self._links:
            added: list[int] = []
            for message in link.receive(MAX_MESSAGES_PER_ROUND):
                match message:
                    case Add():
                        self._add(link, message, added)
                    case Abort():
                        self._abort(link, message)
                    case Ping():
                        self._acknowledge(link, added)  # a Pong says that all before it is done
                        link.send(Pong, nonce=message.nonce)
                    case Shutdown() | Attach() if link is not self._owner:
                        _log.warning("front-end %d does not own this worker", link.front_end)
                    case Shutdown():
                        self._is_stopping = True
                    case Attach():
                        self._attach(message)
            self._acknowledge(link, added)

    def _acknowledge(self, link: FrontEndLink, added: list[int]) -> None:
        if added:
            link.send(Added, sequence_ids=tuple(added))
            added.clear()

    def _add(self, link: FrontEndLink, add: Add, added: list[int]) -> None:
        """Hand the sequence to the scheduler and note it in `added`, or answer why not."""
        refusal = self._refusal_of(link, add)
        if refusal is None:
            added.append(add.sequence_id)
            self._first_steps.added(add.sequence_id)
            self._is_idle_known = False
        else:
            link.send(
                Refused,
                sequence_id=add.sequence_id,
                error_code=refusal.code,
                message=clip_text(refusal.message),
            )

    def _refusal_of(self, link: FrontEndLink, add: Add) -> Refusal | None:
        if front_end_of(add.sequence_id) != link.front_end:
            return Refusal(
                "invalid_request",
                f"sequence id {add.sequence_id} is none of front-end {link.front_end}'s",
            )
        vocab_size = self._configure.vocab_size
        return refusal_of_tokens(add, vocab_size) or self._scheduler.add(
            add.sequence_id,
            add.token_ids,
            add.num_prompt_tokens,
            fit_to_vocabulary(add.params, vocab_size),
        )

    def _abort(self, link: FrontEndLink, abort: Abort) -> None:
        for sequence_id in abort.sequence_ids:
            if front_end_of(sequence_id) == link.front_end:
                self._drop(sequence_id)

    def _drop(self, sequence_id: int) -> None:
        self._scheduler.abort(sequence_id)
        self._first_steps.dropped(sequence_id)

    # --- to the front-ends ------------------------------------------------------------------------

    def _report(self, finished: FinishedStep) -> None:
        """Commit a step and say what came of it, to each front-end of its own sequences."""
        updates = self._scheduler.commit(finished.plan.step_id, finished.result.token_ids.tolist())
        self._first_steps.ran(finished.plan.rows, finished.began_s)
        self._num_steps += 1
        self._num_computed_tokens += finished.plan.num_tokens
        self._num_output_tokens += len(updates)
        self._is_idle_known = not self._scheduler.has_unfinished
        if not self._attached:
            self._send_tokens(self._owner, finished, updates)
            return
        own: dict[int, list[SequenceUpdate]] = {}
        for update in updates:
            own.setdefault(front_end_of(update.sequence_id), []).append(update)
        for link in self._links:
            if link is self._owner or link.front_end in own:
                self._send_tokens(link, finished, own.get(link.front_end, []))

    def _send_tokens(
        self, link: FrontEndLink, finished: FinishedStep, updates: list[SequenceUpdate]
    ) -> None:
        link.send(
            Tokens,
            sequence_ids=tuple([update.sequence_id for update in updates]),
            token_ids=tuple([update.token_id for update in updates]),
            finish_codes=tuple([_CODE_OF_REASON[update.finish_reason] for update in updates]),
            logprobs=_logprobs_of(finished, updates),
            load=self._load(),
            step_s=finished.seconds,
            begun=self._first_steps.take(link.front_end, time.monotonic()),
        )

    def _report_idle(self) -> None:
        """Say so, once, if nothing is left to run and the last message did not show it."""
        if not self._is_idle_known and not self._scheduler.has_unfinished:
            for link in self._links:
                link.send(Idle, load=self._load())
            self._is_idle_known = True

    def _load(self) -> WorkerLoad:
        scheduler = self._scheduler
        return WorkerLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_blocks=scheduler.num_free_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_output_tokens=self._num_output_tokens,
        )


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
