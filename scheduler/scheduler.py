"""What each step runs: continuous batching over a paged KV pool. Pure; values in, values out.

A step is planned in two parts.

1. **Decodes**, in order of arrival: every running sequence of which only the newest token is not
   computed gets one token. A sequence that crosses into a new block takes one; if none is free,
   the latest arrival among the running ones is preempted: its blocks are freed and it goes to the
   head of the waiting queue, to be computed again from its prompt and its tokens so far.
2. **Prefill** with what is left of `max_num_batched_tokens`: running sequences that are not
   through their tokens, in order of arrival, then waiting ones in the queue's order. A waiting
   sequence is admitted with blocks for all its tokens at once, so a chunk never runs short. The
   queue is never overtaken for want of blocks, so a step that had to preempt admits nobody: its
   last victim heads the queue and needs all that it gave up, of which a block is taken.
   `packing.py` says how chunks share the budget.

Admission leaves `spare_blocks_ratio` of the pool free, for running sequences to grow into. When
nothing else runs, a sequence is admitted regardless: whatever was accepted fits the pool alone.

`is_offline` changes two rules. Interactive: a step holds at most a sixteenth of
`max_num_batched_tokens` in prefill tokens, unless there is but one sequence, so that of prompts
that come together the first ones get their first token early, and new ones do not wait for long
steps; and while there is prefill to do, decodes take part in one of `DECODE_INTERVAL` steps.
Offline: every step decodes, and prefill may use all that decodes leave; and admission looks at
lengths: it leaves free the spare share or half of all blocks that the admitted sequences may still
grow by, whichever is more. Half, because sequences at all stages of their growth need half of it
on average.

**Steps in flight.** Up to `queue_limit` steps are planned ahead of their results. A token that a
step in flight will sample stands in later rows as PENDING_TOKEN, and counts towards every length.
Steps run in plan order, which is why blocks can be freed while a step in flight still uses them:
whoever gets them writes in a later step. For the same reason a token that is sampled after its
sequence was preempted is still the right one. Only a stop token cannot be foreseen: the rows
planned behind it are dropped at commit.

**Nothing starves.** The oldest running sequence is never preempted: the victim is the latest, and
a sequence alone fits the pool. It decodes in one of `DECODE_INTERVAL` steps at least. Where it must
wait for budget, decodes or better fits use that up; decodes end, and admit no others meanwhile, and
better fits are bounded in number. So it moves on
until it ends, and another one is the oldest.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, abc, deque
from dataclasses import dataclass

from furiosa_llm.scheduler.block_manager import BlockManager, num_blocks_for
from furiosa_llm.scheduler.config import SchedulerConfig
from furiosa_llm.scheduler.packing import pack_greedy, pack_identity
from furiosa_llm.scheduler.params import SequenceParams
from furiosa_llm.scheduler.refusal import Refusal, num_kv_tokens, refusal_of
from furiosa_llm.scheduler.sequence import Sequence, SequenceState
from furiosa_llm.scheduler.step_plan import PENDING_TOKEN, StepPlan, StepRow

INTERACTIVE_PREFILL_DIVISOR = 16
"""Prefill gets this part of a step's token budget, if not offline and not of one sequence alone.

128 tokens of 2048: enough to keep the arithmetic busy, and few enough that those who are being
answered do not wait long between tokens. Half as many as an eighth: with 16 clients, 128 tokens in
and out, on two cores, the 99th percentile of those gaps fell from 0.44 s to 0.27 s and the median
first token came after 0.52 s instead of 0.81 s, for the same throughput; of 16 that come at once,
the last one's first token came after 2.3 s instead of 1.8 s, and two waves of 64, without more to
follow, took 5 % longer."""

DECODE_INTERVAL = 2
"""While there is prefill to do, every so many steps decode, if not offline.

A decode row costs two or three times a prefill token, so decodes in every step put off the first
tokens of all who wait, and the batch they decode in is the fuller the later they do. In a
simulation of 64 clients with requests of 64 to 192 tokens (0.8 ms a prefill token, 2 ms a decode
row) the median first token came after 0.33 s with two steps of an eighth of the budget to a decode,
and after 0.47 s with one of a quarter. An interval of 4 gained 5 % more where 64 come at once, and
doubled the longest gap."""

MAX_ADMISSION_CANDIDATES = 32
"""Waiting sequences that one step looks at."""


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """One new token of a live sequence, and whether it was the last."""

    sequence_id: int
    token_id: int
    finish_reason: str  # "": it goes on; "stop": a stop token; "length": no more may follow
    row_index: int  # into the step's sampling rows, so into the executor's results


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    step_id: int
    sampling: tuple[Sequence, ...]  # by identity: an id may be aborted and added anew meanwhile


class Scheduler:
    """The sequences of one worker, and what its next step runs."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._blocks = BlockManager(num_blocks=config.num_blocks, block_size=config.block_size)
        self._held: dict[int, Sequence] = {}
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._running: list[Sequence] = []  # in order of arrival
        self._in_flight: deque[_StepInFlight] = deque()
        self._num_added = 0
        self._num_planned = 0
        self._num_preemptions = 0
        self._num_undecoded = 0  # steps in a row that left decodes out

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks, or wait only for results in flight."""
        return len(self._held) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks that need some: new or preempted."""
        return len(self._waiting)

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not yet committed."""
        return len(self._in_flight)

    @property
    def num_preemptions(self) -> int:
        """Since the scheduler was made."""
        return self._num_preemptions

    @property
    def sequence_ids(self) -> tuple[int, ...]:
        """All that are held."""
        return tuple(self._held)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._held)

    def add(
        self,
        sequence_id: int,
        token_ids: abc.Sequence[int],
        num_prompt_tokens: int,
        params: SequenceParams,
    ) -> Refusal | None:
        """Queue a sequence: its prompt, and behind it its tokens so far if it ran before.

        Returns None when it was taken. A refused one leaves no trace.
        """
        config = self._config
        if sequence_id in self._held:
            return Refusal("duplicate_request", f"sequence {sequence_id} is being processed")
        refusal = refusal_of(config, token_ids, num_prompt_tokens, params)
        if refusal is not None:
            return refusal
        if len(self._held) >= config.max_processing_samples:
            return Refusal(
                "overloaded",
                f"{len(self._held)} sequences are being processed and max_processing_samples is "
                f"{config.max_processing_samples}: try again when one has ended",
            )
        sequence = Sequence(
            sequence_id=sequence_id,
            arrival_index=self._num_added,
            token_ids=list(token_ids),
            num_prompt_tokens=num_prompt_tokens,
            max_len=min(config.max_model_len, num_prompt_tokens + params.max_tokens),
            params=params,
            stop_token_ids=frozenset(params.stop_token_ids),
        )
        self._num_added += 1
        self._held[sequence_id] = self._waiting[sequence_id] = sequence
        return None

    def abort(self, sequence_id: int) -> bool:
        """Drop a sequence and free its blocks; False when no such one is held."""
        sequence = self._held.get(sequence_id)
        if sequence is None:
            return False
        self._drop(sequence)
        return True

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to run before a commit or an add."""
        if len(self._in_flight) >= self._config.queue_limit:
            return None
        chunks = self._plan_chunks()
        if not chunks:
            return None
        rows, sampling = [], []
        for sequence, num_new in chunks:
            row = self._make_row(sequence, num_new)
            rows.append(row)
            if row.params is not None:
                sampling.append(sequence)
        self._retire(sampling)
        plan = StepPlan(step_id=self._num_planned, rows=tuple(rows))
        self._num_planned += 1
        self._in_flight.append(_StepInFlight(plan.step_id, tuple(sampling)))
        return plan

    def commit(self, step_id: int, token_ids: abc.Sequence[int]) -> list[SequenceUpdate]:
        """Take the sampled tokens of the oldest step in flight, in the order of its sampling rows.

        Returns what became of each sequence that is still held, in the same order. Tokens of
        sequences that ended or were aborted meanwhile are dropped.
        """
        assert self._in_flight, f"step {step_id} is not in flight"
        step = self._in_flight.popleft()
        assert step.step_id == step_id, f"step {step_id} is committed before {step.step_id}"
        assert len(token_ids) == len(step.sampling), (
            f"step {step_id} samples {len(step.sampling)} tokens, not {len(token_ids)}"
        )
        updates: list[SequenceUpdate] = []
        for row_index, sequence in enumerate(step.sampling):
            if sequence.state is SequenceState.FINISHED:
                continue
            token_id = token_ids[row_index]
            sequence.token_ids.append(token_id)
            sequence.num_pending -= 1
            finish_reason = _finish_reason(sequence, token_id)
            if finish_reason:
                self._drop(sequence)
            updates.append(SequenceUpdate(sequence.sequence_id, token_id, finish_reason, row_index))
        return updates

    def _plan_chunks(self) -> list[tuple[Sequence, int]]:
        """The sequences of the next step, each with the number of its tokens."""
        if not self._config.is_offline and self._num_undecoded < DECODE_INTERVAL - 1:
            chunks = self._plan_prefill(num_decodes=0)
            if chunks:
                self._num_undecoded += 1
                return chunks
        self._num_undecoded = 0
        chunks = self._plan_decodes()
        return chunks + self._plan_prefill(num_decodes=len(chunks))

    def _plan_decodes(self) -> list[tuple[Sequence, int]]:
        """One token for each running sequence that decodes, preempting the latest where needed."""
        chunks: list[tuple[Sequence, int]] = []
        index = 0
        # Victims leave from the end of the list, where nothing is planned yet.
        while index < len(self._running) and len(chunks) < self._config.max_num_batched_tokens:
            sequence = self._running[index]
            if sequence.is_decoding and self._grow(sequence):
                chunks.append((sequence, 1))
            index += 1
        return chunks

    def _grow(self, sequence: Sequence) -> bool:
        """Find a block for the newest token, preempting the latest arrivals; False if it is one."""
        while not self._blocks.append(sequence.sequence_id, sequence.num_tokens):
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._blocks.free(victim.sequence_id)
        victim.state = SequenceState.WAITING
        victim.num_computed = 0
        self._waiting[victim.sequence_id] = victim
        self._waiting.move_to_end(victim.sequence_id, last=False)
        self._num_preemptions += 1

    def _plan_prefill(self, *, num_decodes: int) -> list[tuple[Sequence, int]]:
        """Chunks for running sequences behind on their tokens and for those admitted now."""
        config = self._config
        budget = config.max_num_batched_tokens - num_decodes
        if not config.is_offline and len(self._held) > 1:
            share = max(1, config.max_num_batched_tokens // INTERACTIVE_PREFILL_DIVISOR)
            budget = min(budget, share)
        if budget == 0 or (num_decodes == len(self._running) and not self._waiting):
            return []
        candidates = [s for s in self._running if not s.is_decoding and s.num_prefillable]
        if self._waiting:
            candidates += self._admissible(budget - sum(s.num_prefillable for s in candidates))
        if not candidates:
            return []
        wanted = [sequence.num_prefillable for sequence in candidates]
        if config.packing_type == "GREEDY":
            sizes = pack_greedy(wanted, [s.num_bypassed for s in candidates], budget)
        else:
            sizes = pack_identity(wanted, budget)
        last_served = max(index for index, size in enumerate(sizes) if size)
        chunks: list[tuple[Sequence, int]] = []
        for index, (sequence, size) in enumerate(zip(candidates, sizes, strict=True)):
            if size:
                if sequence.state is SequenceState.WAITING:
                    self._admit(sequence)
                sequence.num_bypassed = 0
                chunks.append((sequence, size))
            elif index < last_served:
                sequence.num_bypassed += 1
        return chunks

    def _admissible(self, budget: int) -> list[Sequence]:
        """The head of the waiting queue, as far as there is room for all of it at once.

        In arrival order no more of them are of use than the tokens left to give (`budget`).
        """
        config = self._config
        num_slots = min(config.max_num_seqs - len(self._running), MAX_ADMISSION_CANDIDATES)
        num_free = self._blocks.num_free
        num_growth = sum(map(self._num_growth_blocks, self._running)) if config.is_offline else 0
        admissible: list[Sequence] = []
        for sequence in self._waiting.values():
            if len(admissible) >= num_slots or (config.packing_type == "IDENTITY" and budget <= 0):
                break
            num_free -= num_blocks_for(sequence.num_tokens, config.block_size)
            if config.is_offline:
                num_growth += self._num_growth_blocks(sequence)
            is_only_one = not self._running and not admissible
            if num_free < max(config.num_spare_blocks, num_growth // 2) and not is_only_one:
                break
            admissible.append(sequence)
            budget -= sequence.num_prefillable
        return admissible

    def _num_growth_blocks(self, sequence: Sequence) -> int:
        """Blocks that the sequence may still need beyond those for the tokens it has."""
        size = self._config.block_size
        max_blocks = num_blocks_for(num_kv_tokens(sequence.max_len), size)
        return max_blocks - num_blocks_for(sequence.num_tokens, size)

    def _admit(self, sequence: Sequence) -> None:
        is_allocated = self._blocks.allocate(sequence.sequence_id, sequence.num_tokens)
        assert is_allocated, "admission counted its blocks"
        del self._waiting[sequence.sequence_id]
        sequence.state = SequenceState.RUNNING
        insort(self._running, sequence, key=lambda s: s.arrival_index)

    def _make_row(self, sequence: Sequence, num_new: int) -> StepRow:
        """The next `num_new` tokens of a sequence as a row; the sequence moves on by them."""
        known, params = sequence.token_ids, sequence.params
        start, end = sequence.num_computed, sequence.num_computed + num_new
        token_ids = tuple(known[start:end])
        if end > len(known):
            token_ids = (*token_ids, PENDING_TOKEN)
        block_ids = self._blocks.table(sequence.sequence_id)
        sequence.num_computed = end
        if end < sequence.num_tokens:
            return StepRow(sequence.sequence_id, start, token_ids, block_ids, None)
        num_pending = sequence.num_pending
        is_early = sequence.num_output_tokens < params.min_tokens
        history: tuple[int, ...] = ()
        if params.needs_output:
            first = 0 if params.needs_prompt else sequence.num_prompt_tokens
            history = (*known[first:], *(PENDING_TOKEN,) * num_pending)
        sequence.num_pending += 1
        return StepRow(
            sequence_id=sequence.sequence_id,
            start=start,
            token_ids=token_ids,
            block_ids=block_ids,
            params=params,
            suppressed_token_ids=params.stop_token_ids if is_early else (),
            history=history,
            num_history_prompt=sequence.num_prompt_tokens if params.needs_prompt else 0,
            num_pending=num_pending if params.needs_output else 0,
        )

    def _retire(self, sampling: list[Sequence]) -> None:
        """Free the blocks of sequences whose last token this step samples.

        No later row reads them, and whoever gets them writes in a later step.
        """
        retired = [sequence for sequence in sampling if sequence.num_tokens == sequence.max_len]
        for sequence in retired:
            self._blocks.free(sequence.sequence_id)
            sequence.state = SequenceState.DRAINING
        if retired:
            self._running = [s for s in self._running if s.state is SequenceState.RUNNING]

    def _drop(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state."""
        del self._held[sequence.sequence_id]
        if sequence.state is SequenceState.WAITING:
            del self._waiting[sequence.sequence_id]
        elif sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
            self._blocks.free(sequence.sequence_id)
        sequence.state = SequenceState.FINISHED


def _finish_reason(sequence: Sequence, token_id: int) -> str:
    """Why the sequence ends with `token_id`, its newest token; "" when it does not."""
    if token_id in sequence.stop_token_ids:
        return "stop"  # before min_tokens the row suppressed it
    return "length" if len(sequence.token_ids) == sequence.max_len else ""
