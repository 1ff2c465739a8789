"""One HTTP request's work in the engine: its prompts, each with n choices, as one flow of deltas.

    async with Generation(service, ...) as generation:
        await generation.start(prompts, params)
        async for deltas in generation: ...

Leaving the block ends whatever still runs, so a client that goes away, an error and a cancelled
task all free what the request held.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from starlette.types import Receive

from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.engine.request import ABORT, Request
from furiosa_llm.errors import (
    ContextLengthError,
    EngineShutDownError,
    RequestAbortedError,
    WorkerDiedError,
)
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
from furiosa_llm.server.mailbox import ClientLeftError, Delta, Mailbox
from furiosa_llm.server.service import Service
from furiosa_llm.server.usage import Usage, usage_of

LONG_TEXT_CHARS = 2_000
"""Text from here on is tokenised on a thread: at about 0.5 µs a character it would hold up the
event loop for over 1 ms."""

MAX_CHARS_PER_TOKEN = 256
"""The longest tokens of today's vocabularies are runs of some 128 spaces."""

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one answer is asked for."""

    value: str | list[int]
    add_special_tokens: bool = True


class Generation:
    """See the module.

    Attributes:
        requests: the engine's, one per prompt; choice i belongs to prompt i // n.
        num_tokens: made so far, of all choices.
    """

    def __init__(self, service: Service, request_id: str, *, endpoint: str) -> None:
        self.requests: list[Request] = []
        self.num_tokens = 0
        self._service = service
        self._metrics = service.metrics
        self._request_id = request_id
        self._endpoint = endpoint
        self._mailbox = Mailbox(service.delivery)
        self._stack = ExitStack()
        self._watcher: asyncio.Task[None] | None = None
        self._engine: AsyncLLMEngine | None = None
        self._reasons: dict[int, str] = {}
        self._num_choices = 0
        self._is_whole = False
        self._started_s = self._last_s = 0.0

    @property
    def usage(self) -> Usage:
        """So far."""
        return usage_of(self.num_prompt_tokens, self.num_tokens, self._mailbox.num_cached_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    def prompt_token_ids(self, choice: int) -> tuple[int, ...]:
        """Those of the prompt that a choice goes on with."""
        return self.requests[choice * len(self.requests) // self._num_choices].prompt_token_ids

    @property
    def is_finished(self) -> bool:
        return len(self._reasons) == self._num_choices

    async def start(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        """Check and tokenise everything, then hand it to the engine.

        Raises: what the engine refuses, and then nothing of it runs; ServiceUnavailableError,
            OverloadedError.
        """
        self._num_choices = len(prompts) * params.n
        self._is_whole = params.output_kind is RequestOutputKind.FINAL
        self._engine = self._stack.enter_context(
            self._service.admit(self._request_id, self._num_choices)
        )
        self._started_s = self._last_s = time.monotonic()
        engine = self._engine
        for prompt in prompts:
            _check_length(prompt, engine.max_model_len)
        num_chars = sum(len(prompt.value) for prompt in prompts)
        if num_chars >= LONG_TEXT_CHARS:
            self.requests = await self._service.in_text_thread(
                lambda: self._make_requests(engine, prompts, params)
            )
        else:
            self.requests = self._make_requests(engine, prompts, params)
        self._metrics.request_started(
            endpoint=self._endpoint, num_choices=self._num_choices, max_tokens=params.max_tokens
        )
        try:
            for request in self.requests:
                engine.submit(request)
        except (WorkerDiedError, EngineShutDownError) as error:  # it takes no request ever again
            self._service.fail(error)
            raise self._service.unavailable() from error

    def watch(self, receive: Receive) -> None:
        """End this when the client leaves."""
        self._watcher = asyncio.create_task(self._until_disconnect(receive))

    async def take(self) -> list[Delta]:
        """Wait for what is new, by choice.

        Raises: what ended it early; ClientLeftError.
        """
        return self._counted(await self._mailbox.take())

    def poll(self) -> list[Delta]:
        """As `take`, without waiting: perhaps nothing."""
        return self._counted(self._mailbox.poll())

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call `listener`, which must not raise, when there is something to `poll`."""
        self._mailbox.listener = listener

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yield what `take` gives until all choices have ended."""
        while not self.is_finished:
            yield await self.take()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        if self._engine is not None:
            for request in self.requests:
                self._engine.drop(request)
        self._stack.close()
        if isinstance(error, ClientLeftError | asyncio.CancelledError | GeneratorExit):
            self._metrics.aborted(num_tokens=self.num_tokens)

    def _make_requests(
        self, engine: AsyncLLMEngine, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list[Request]:
        make = engine.settings.inputs.make_request
        return [
            make(
                # The client's id may come twice at a time; the engine's ids are unique.
                f"{self._request_id}-{next(_numbers)}",
                p.value if isinstance(p.value, str) else {"prompt_token_ids": p.value},
                params,
                self._mailbox.sink(index * params.n),
                add_special_tokens=p.add_special_tokens,
            )
            for index, p in enumerate(prompts)
        ]

    def _counted(self, deltas: list[Delta]) -> list[Delta]:
        count = 0
        for delta in deltas:
            count += len(delta.token_ids)
            if delta.finish_reason is not None:
                if delta.finish_reason == ABORT:
                    raise RequestAbortedError("the request was aborted by the server")
                self._reasons[delta.choice] = delta.finish_reason
        if count:
            now_s = time.monotonic()
            if self.num_tokens == 0:
                self._metrics.first_token(
                    seconds=None if self._is_whole else now_s - self._started_s,
                    num_prompt_tokens=self.num_prompt_tokens,
                    count=count,
                )
            else:
                self._metrics.tokens(count=count, seconds=now_s - self._last_s)
            self.num_tokens += count
            self._last_s = now_s
        if deltas and self.is_finished:
            self._metrics.finished(
                reasons=list(self._reasons.values()),
                num_prompt_tokens=self.num_prompt_tokens,
                num_tokens=self.num_tokens,
                seconds=time.monotonic() - self._started_s,
            )
        return deltas

    async def _until_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._mailbox.leave()


def _check_length(prompt: Prompt, max_model_len: int) -> None:
    """Refuse what cannot fit without tokenising it: that would take seconds of a core."""
    num = len(prompt.value)
    most = max_model_len * (MAX_CHARS_PER_TOKEN if isinstance(prompt.value, str) else 1)
    if num > most:
        unit = "characters" if isinstance(prompt.value, str) else "tokens"
        raise ContextLengthError(
            f"the prompt has {num} {unit}, more than fit the maximum context length of "
            f"{max_model_len} tokens: shorten it",
            param="prompt",
        )
