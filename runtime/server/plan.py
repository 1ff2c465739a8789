"""What one request asks for, once everything about it has been checked."""

from __future__ import annotations

from dataclasses import dataclass

from furiosa_llm.sampling_params import SamplingParams
from furiosa_llm.server.chunks import FormatLogprobs
from furiosa_llm.server.generation import Prompt


@dataclass(frozen=True, slots=True)
class Plan:
    """Prompts with n choices each; choice i is of prompt i // n."""

    prompts: list[Prompt]
    params: SamplingParams
    logprobs: FormatLogprobs | None = None
    """What a delta's are; None: they were not asked for."""
    echoes: list[str] | None = None
    """What each prompt's choices begin with."""
    is_stream: bool = False
    with_token_ids: bool = False
    with_usage: bool = False
    """In a stream: at its end. A whole reply always has it."""
    with_running_usage: bool = False

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    def echo(self, choice: int) -> str:
        return "" if self.echoes is None else self.echoes[choice // self.params.n]
