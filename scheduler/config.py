"""The few numbers that shape every decision of one worker's scheduler."""

from __future__ import annotations

from dataclasses import dataclass

PACKING_TYPES = ("IDENTITY", "GREEDY")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds and policies, fixed for a worker's life. The front-end has checked what users set."""

    num_blocks: int
    block_size: int  # tokens
    max_model_len: int
    """Tokens of one sequence at most, prompt and output together."""
    max_num_seqs: int
    """Sequences that hold blocks at a time, so also rows of a step."""
    max_num_batched_tokens: int
    """Tokens of one step at most."""
    max_processing_samples: int
    """Sequences held at a time, waiting ones included."""
    queue_limit: int
    """Steps in flight at most: planned and not yet committed."""
    spare_blocks_ratio: float = 0.0
    """Share of the pool kept back at admission, so that running sequences can grow."""
    is_offline: bool = False
    """Throughput before latency; scheduler.py says what changes."""
    packing_type: str = "IDENTITY"
    """How prefill chunks share a step's budget; packing.py says how."""

    def __post_init__(self) -> None:
        for name in (
            "num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens",
            "max_processing_samples", "queue_limit",
        ):  # fmt: skip
            assert getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, not at least 1"
        assert self.max_model_len >= 2, "a prompt token and an answer token need two"
        assert 0.0 <= self.spare_blocks_ratio < 1.0, self.spare_blocks_ratio
        assert self.packing_type in PACKING_TYPES, self.packing_type

    @property
    def num_spare_blocks(self) -> int:
        return int(self.num_blocks * self.spare_blocks_ratio)
