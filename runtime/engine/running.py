"""The sequences that are under way: which worker has each, and what becomes of it.

Recovery is one rule: a sequence is its prompt, its tokens so far, its parameters and its seed. When
a worker dies, what it held is added to another one with the tokens that have arrived; a message of
the dead epoch that comes later is dropped, so no token is lost, repeated or changed.
"""

from __future__ import annotations

import itertools
import logging
import math
import time

from furiosa_llm.engine.counts import EngineCounts
from furiosa_llm.engine.live_requests import LiveRequests
from furiosa_llm.engine.pool import Pool, WorkerDown
from furiosa_llm.engine.request import Choice, Request
from furiosa_llm.engine.router import Dispatch, Router
from furiosa_llm.engine.supervisor import MAX_CRASHES_PER_REQUEST
from furiosa_llm.errors import (
    FuriosaLLMError,
    InvalidRequestError,
    OverloadedError,
    QuarantinedError,
    from_wire,
)
from furiosa_llm.wire.messages import (
    FINISH_REASONS,
    Abort,
    Add,
    Refused,
    Tokens,
    first_sequence_id,
)

MAX_DISPATCHED = 4096
"""Sequences sent to one worker at most, however many it may hold: far more than fit in a step, and
few enough that all their messages fit in its socket's queue even while it is busy with a step."""

REOPEN_AFTER_S = 0.05
"""After so long a worker that other front-ends have filled is asked again."""

_log = logging.getLogger(__name__)


class RunningSequences:
    """For the engine's thread, which hands in its pool; `num_waiting` and `num_dispatched` for any.

    Args:
        front_end: whose sequences they are; see `first_sequence_id`.
        max_per_worker: that a worker may hold.
        max_num_seqs: that a step runs.
    """

    def __init__(
        self,
        live: LiveRequests,
        counts: EngineCounts,
        *,
        front_end: int,
        max_per_worker: int,
        max_num_seqs: int,
    ) -> None:
        self._live = live
        self._counts = counts
        self._max_num_seqs = max_num_seqs
        self._router = Router(max_sequences_per_worker=min(max_per_worker, MAX_DISPATCHED))
        self._choices: dict[int, Choice] = {}  # by sequence id, while unfinished
        self._ids = itertools.count(first_sequence_id(front_end) + 1)
        self._reopen_s = math.inf  # when workers that refused for want of room are asked again

    @property
    def num_waiting(self) -> int:
        """Those that no worker has room for, or that wait for a worker to come up."""
        return self._router.num_waiting

    def num_dispatched(self, worker_id: int) -> int:
        """Those that the worker was sent."""
        return self._router.num_dispatched(worker_id)

    def clear(self) -> None:
        """All have ended."""
        self._choices.clear()

    # --- requests ---------------------------------------------------------------------------------

    def begin(self, pool: Pool, request: Request) -> None:
        """Queue the sequences of a request that was taken."""
        if (ended_by := self._live.ended_by) is not None:
            self.end(pool, request, ended_by)
            return
        for index in range(len(request.sequence_params)):
            choice = Choice(index, next(self._ids), request)
            request.choices.append(choice)
            if request.resume_token_ids:
                choice.resume(request.resume_token_ids[index])
        running = [choice for choice in request.choices if choice.finish_reason is None]
        if len(running) != request.num_unfinished:
            text = "resume_token_ids: a choice has one of its stop strings already, so it has ended"
            self.end(pool, request, InvalidRequestError(text, param="resume_token_ids"))
            return
        self._choices.update((choice.sequence_id, choice) for choice in running)
        num_prompt_tokens = len(request.prompt_token_ids)
        lengths = [(c.sequence_id, num_prompt_tokens + len(c.token_ids)) for c in running]
        self._dispatch(pool, self._router.submit(lengths))

    def abort(self, pool: Pool, request_ids: list[str]) -> None:
        """End these requests as they stand; their readers get a last output."""
        for request_id in request_ids:
            request = self._live.get(request_id)
            if request is None or request.is_over:
                continue
            unfinished = [c for c in request.choices if c.finish_reason is None]
            self._release(pool, unfinished)
            for choice in unfinished:
                choice.abort()
            self._live.forget(request)
            request.put_output(unfinished)

    def end(self, pool: Pool, request: Request, error: FuriosaLLMError | None = None) -> None:
        """Stop what still runs of a request, and forget it; its reader gets the error, if any."""
        if request.is_over:
            return
        self._release(pool, request.choices)
        request.is_over = True
        self._live.forget(request)
        if error is not None:
            request.put_error(error)

    def _release(self, pool: Pool, choices: list[Choice]) -> None:
        """Free these sequences wherever they are: in a worker, or waiting."""
        by_worker: dict[int, list[int]] = {}
        for choice in choices:
            if self._choices.pop(choice.sequence_id, None) is None:
                continue
            worker_id = self._router.worker_of(choice.sequence_id)
            if worker_id is not None:
                by_worker.setdefault(worker_id, []).append(choice.sequence_id)
        # First the aborts, so that what is dispatched into the freed room finds it free.
        for worker_id, sequence_ids in by_worker.items():
            pool.send(worker_id, Abort(tuple(sequence_ids)))
        self._dispatch(pool, self._router.finish(*(choice.sequence_id for choice in choices)))

    def _dispatch(self, pool: Pool, effects: list[Dispatch]) -> None:
        for effect in effects:
            choice = self._choices[effect.sequence_id]
            request = choice.request
            add = Add(
                sequence_id=choice.sequence_id,
                token_ids=(*request.prompt_token_ids, *choice.token_ids),
                num_prompt_tokens=len(request.prompt_token_ids),
                params=request.sequence_params[choice.index],
            )
            choice.num_resumed_tokens = len(choice.token_ids)
            pool.send(effect.worker_id, add)

    # --- workers ----------------------------------------------------------------------------------

    def worker_up(self, pool: Pool, worker_id: int) -> None:
        """It takes sequences from now on."""
        self._dispatch(pool, self._router.worker_up(worker_id))

    def take_tokens(self, pool: Pool, message: Tokens) -> None:
        """Hand out what a step has made."""
        self._count_step(message)
        logprobs = dict(message.logprobs)
        # A request with several choices in one step yields one output for them all.
        changed: dict[Request, list[Choice]] = {}
        grown: list[int] = []
        freed: list[int] = []
        stopped: list[Choice] = []
        has_failed = False
        choice_of = self._choices.get
        rows = zip(message.sequence_ids, message.token_ids, message.finish_codes, strict=True)
        for index, (sequence_id, token_id, finish_code) in enumerate(rows):
            choice = choice_of(sequence_id)
            if choice is None:
                continue  # aborted, and the worker had not heard of it yet
            request = choice.request
            try:
                choice.append(token_id, FINISH_REASONS[finish_code], logprobs.get(index))
            except Exception as error:  # a defect that one request meets must not end the others
                _log.exception("request %r cannot go on", request.request_id)
                text = f"the request failed: {type(error).__name__}: {error}"
                self.end(pool, request, FuriosaLLMError(text))
                has_failed = True
                continue
            if request in changed:
                changed[request].append(choice)
            else:
                changed[request] = [choice]
            if finish_code:
                del self._choices[sequence_id]
                freed.append(sequence_id)
            elif choice.finish_reason is not None:  # by a stop string: the worker does not know
                stopped.append(choice)
            else:
                grown.append(sequence_id)
        # First the ledger: what a reader is about to send must find it as it is.
        if has_failed:  # and with that request, others of its choices
            grown = [sequence_id for sequence_id in grown if sequence_id in self._choices]
        self._router.progress(message.worker_id, grown)
        for request, choices in changed.items():
            if request.is_over:  # one of its other choices has failed
                continue
            if request.is_finished:
                self._live.forget(request)  # before its reader hears of it and uses its id again
            request.put_output(choices)
        self._release(pool, stopped)
        self._dispatch(pool, self._router.finish(*freed))

    def _count_step(self, message: Tokens) -> None:
        self._counts.step_s[message.worker_id].add(message.step_s)
        for sequence_id, age_s in message.begun:
            choice = self._choices.get(sequence_id)
            if choice is not None and not choice.has_begun:
                choice.has_begun = True
                waited_s = time.monotonic() - age_s - choice.request.submitted_s
                self._counts.queue_s.add(max(0.0, waited_s))

    def refused(self, pool: Pool, refused: Refused) -> None:
        """A worker does not take a sequence."""
        choice = self._choices.get(refused.sequence_id)
        if choice is None:
            return
        if refused.error_code == OverloadedError.code:
            # Other front-ends have filled the worker. It is asked again when something of ours has
            # ended there, and after a while, for nothing of ours may be there.
            self._dispatch(pool, self._router.refused(refused.sequence_id))
            self._reopen_s = time.monotonic() + REOPEN_AFTER_S
            return
        self.end(pool, choice.request, from_wire(refused.error_code, refused.message))

    def reopen(self, pool: Pool) -> None:
        """Ask workers that were full again, when it is time to."""
        if math.isinf(self._reopen_s):
            return
        if time.monotonic() >= self._reopen_s:
            self._reopen_s = math.inf
            self._dispatch(pool, self._router.reopen())
        if not math.isinf(self._reopen_s):
            pool.wake_by(self._reopen_s)

    def worker_down(self, pool: Pool, event: WorkerDown) -> None:
        """Move what the worker held, but for what seems to have killed it."""
        lost = self._router.worker_down(event.worker_id)
        orphans = [choice for choice in map(self._choices.get, lost) if choice is not None]
        for index, choice in enumerate(() if event.was_asked else orphans):
            # Only what ran can have killed it: it got tokens there, or was among the first in line.
            if index < self._max_num_seqs or len(choice.token_ids) > choice.num_resumed_tokens:
                choice.num_crashes += 1
            if choice.num_crashes >= MAX_CRASHES_PER_REQUEST:
                request_id = choice.request.request_id
                error = QuarantinedError(
                    f"request {request_id!r} was running in {choice.num_crashes} workers that "
                    f"died, so it is not tried again; the last: {event.cause}"
                )
                self.end(pool, choice.request, error)
        to_move = [
            (choice.sequence_id, len(choice.request.prompt_token_ids) + len(choice.token_ids))
            for choice in orphans
            if choice.sequence_id in self._choices
        ]
        moved = {self._choices[sequence_id].request for sequence_id, _ in to_move}
        self._counts.num_migrated["reload" if event.was_asked else "death"] += len(moved)
        self._dispatch(pool, self._router.submit(to_move, first=True))
