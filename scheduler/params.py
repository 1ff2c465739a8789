"""What a worker needs to know of a request's sampling parameters, already resolved.

The front-end turns the public `SamplingParams` into this: every default filled in, the seed
drawn, the end-of-sequence tokens merged into `stop_token_ids`.
"""

from __future__ import annotations

from dataclasses import dataclass

GREEDY_TEMPERATURE = 1e-5  # below it, sampling is argmax
MAX_PENALTY = 2.0  # presence and frequency, either way
MAX_BIAS = 100.0  # either way
MAX_BIASES = 1024  # of one sequence


@dataclass(frozen=True, slots=True)
class SequenceParams:
    """How one sequence is sampled and when it ends. All values are in range; the caller checked."""

    max_tokens: int
    """Output tokens at most, counted from the prompt's end; at least 1."""
    min_tokens: int = 0
    """Before this many output tokens no token of `stop_token_ids` can be sampled."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling one of these ends the sequence; the token is part of the output."""
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the output so far holds; -2 to 2."""
    frequency_penalty: float = 0.0
    """As the presence penalty, times how often the output holds the token."""
    bias_token_ids: tuple[int, ...] = ()
    """Ascending, none twice."""
    bias_values: tuple[float, ...] = ()
    """Added to the logits of `bias_token_ids`; -100 to 100."""
    seed: int = 0  # unsigned 64-bit
    choice_index: int = 0
    num_logprobs: int = -1
    """-1: none; 0: the sampled token's; k: also those of the k likeliest."""

    @property
    def needs_prompt(self) -> bool:
        """Whether sampling depends on which tokens the prompt holds."""
        return self.repetition_penalty != 1.0

    @property
    def needs_output(self) -> bool:
        """Whether sampling depends on which tokens the output so far holds."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
