"""The router: exact ledger, least loaded first, bounded workers, nothing forgotten."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from furiosa_llm.engine.router import Dispatch, Router


def up(num_workers, *, max_sequences=8):
    router = Router(max_sequences_per_worker=max_sequences)
    for worker_id in range(num_workers):
        assert router.worker_up(worker_id) == []
    return router


def test_the_least_loaded_worker_is_next():
    router = up(2)
    assert router.submit([(1, 100)]) == [Dispatch(1, 0)]
    assert router.submit([(2, 10), (3, 10)]) == [Dispatch(2, 1), Dispatch(3, 1)]
    for _ in range(90):
        router.progress(1, [2])
    assert router.submit([(4, 1)]) == [Dispatch(4, 0)]
    assert router.load(1) == (2, 110)


def test_an_idle_set_is_used_evenly():
    router = up(3)
    workers = []
    for sequence_id in range(6):
        (dispatch,) = router.submit([(sequence_id, 5)])
        workers.append(dispatch.worker_id)
        router.finish(sequence_id)
    assert workers == [0, 1, 2, 0, 1, 2]


def test_a_worker_that_refuses_for_want_of_room_is_asked_again_later():
    router = up(2)
    assert router.submit([(1, 5), (2, 5), (3, 5)]) == [
        Dispatch(1, 0), Dispatch(2, 1), Dispatch(3, 0),
    ]  # fmt: skip
    assert router.refused(1) == [Dispatch(1, 1)]  # the other one may have room
    assert router.refused(1) == []
    assert router.submit([(4, 5)]) == []
    assert router.load(0) == (1, 5)
    assert router.finish(2) == [Dispatch(1, 1), Dispatch(4, 1)]  # room there, and none at 0
    assert router.submit([(5, 1)]) == [Dispatch(5, 1)]
    assert router.reopen() == []
    assert router.submit([(6, 1)]) == [Dispatch(6, 0)]


def test_what_finds_no_room_waits_its_turn():
    router = up(1, max_sequences=1)
    assert router.submit([(1, 5), (2, 5), (3, 5)]) == [Dispatch(1, 0)]
    assert router.num_waiting == 2
    assert router.finish(3) == []  # ended while it waited
    assert router.finish(1) == [Dispatch(2, 0)]


def test_what_ends_together_is_not_sent_into_its_own_room():
    router = up(1, max_sequences=1)
    router.submit([(1, 5), (2, 5), (3, 5)])
    assert router.finish(1, 2) == [Dispatch(3, 0)]
    assert router.finish(1, 2, 3) == []
    assert router.load(0) == (0, 0)


def test_a_dead_workers_sequences_go_first_to_the_next():
    router = up(1, max_sequences=2)
    router.submit([(1, 5), (2, 5), (3, 5)])
    assert router.worker_down(0) == [1, 2]
    assert router.submit([(1, 6), (2, 7)], first=True) == []
    assert router.worker_up(1) == [Dispatch(1, 1), Dispatch(2, 1)]
    assert router.load(1) == (2, 13)


class RouterMachine(RuleBasedStateMachine):
    """Random traffic and deaths against a model that is only a dict of lengths."""

    def __init__(self):
        super().__init__()
        self.router = Router(max_sequences_per_worker=2)
        self.num_tokens = {}  # of every sequence that is not finished
        self.place = {}  # where those that run, run
        self.up = set()
        self.next_id = 0

    def apply(self, effects):
        for effect in effects:
            assert effect.sequence_id not in self.place
            assert effect.worker_id in self.up
            self.place[effect.sequence_id] = effect.worker_id

    @rule(lengths=st.lists(st.integers(1, 50), max_size=4))
    def submit(self, lengths):
        new = {self.next_id + i: length for i, length in enumerate(lengths)}
        self.next_id += len(new)
        self.num_tokens |= new
        self.apply(self.router.submit(list(new.items())))

    @rule(worker_id=st.integers(0, 2))
    def worker_up(self, worker_id):
        if worker_id not in self.up:
            self.up.add(worker_id)
            self.apply(self.router.worker_up(worker_id))

    @rule(worker_id=st.integers(0, 2))
    def worker_down(self, worker_id):
        orphans = self.router.worker_down(worker_id)
        assert sorted(orphans) == sorted(s for s, w in self.place.items() if w == worker_id)
        self.up.discard(worker_id)
        for sequence_id in orphans:
            del self.place[sequence_id]
        self.apply(self.router.submit([(s, self.num_tokens[s]) for s in orphans], first=True))

    @precondition(lambda self: self.num_tokens)
    @rule(data=st.data())
    def finish(self, data):
        sequence_id = data.draw(st.sampled_from(sorted(self.num_tokens)))
        del self.num_tokens[sequence_id]
        self.place.pop(sequence_id, None)
        self.apply(self.router.finish(sequence_id))

    @precondition(lambda self: self.place)
    @rule(data=st.data(), num_tokens=st.integers(1, 9))
    def progress(self, data, num_tokens):
        sequence_id = data.draw(st.sampled_from(sorted(self.place)))
        self.num_tokens[sequence_id] += num_tokens
        self.router.progress(self.place[sequence_id], [sequence_id] * num_tokens)

    @invariant()
    def the_ledger_is_exact(self):
        for worker_id in self.up:
            held = [s for s, w in self.place.items() if w == worker_id]
            assert self.router.load(worker_id) == (len(held), sum(self.num_tokens[s] for s in held))
            assert len(held) <= 2

    @invariant()
    def nobody_waits_while_there_is_room(self):
        assert self.router.num_waiting == len(self.num_tokens) - len(self.place)
        assert self.router.num_waiting == 0 or len(self.place) == 2 * len(self.up)


TestRouterMachine = RouterMachine.TestCase
