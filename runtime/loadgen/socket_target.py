"""A daemon of ours over its socket, by the client library."""

from __future__ import annotations

from dataclasses import fields
from typing import Self

from furiosa_llm.checks import refuse
from furiosa_llm.client import AsyncClient, DaemonUnreachableError, RequestTimeoutError
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.loadgen.options import BenchOptions
from furiosa_llm.loadgen.record import Record, clock
from furiosa_llm.loadgen.target import Prompt
from furiosa_llm.outputs import RequestOutput
from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams


class SocketTarget:
    """All requests share one connection."""

    def __init__(self, client: AsyncClient, options: BenchOptions) -> None:
        self._client = client
        self._is_chat, self._is_stream = options.endpoint == "chat", options.stream
        self._timeout_s = options.timeout_s
        self._params = _params(options)

    @classmethod
    async def connect(cls, options: BenchOptions) -> Self:
        """Raises: FuriosaLLMError if the daemon is not there, or refuses."""
        assert options.connect is not None
        target = cls(AsyncClient(options.connect), options)
        try:
            await target._client.ping()
        except BaseException:
            await target.close()
            raise
        return target

    async def send(self, prompt: Prompt, record: Record) -> None:
        record.sent_s = clock()
        try:
            if self._is_stream:
                await self._stream(prompt, record)
            else:
                self._note(await self._whole(prompt), record)
        except RequestTimeoutError as error:
            record.fail("timeout", str(error))
        except DaemonUnreachableError as error:
            record.fail("connect", str(error))
        except FuriosaLLMError as error:
            record.fail(error.code, str(error))
        record.end_s = clock()

    async def _stream(self, prompt: Prompt, record: Record) -> None:
        asked, timeout_s = self._asked(prompt), self._timeout_s
        if self._is_chat:
            stream = self._client.stream_chat(asked, self._params, timeout_s=timeout_s)
        else:
            stream = self._client.stream_generate(asked, self._params, timeout_s=timeout_s)
        async with stream:
            async for output in stream:
                self._note(output, record)

    async def _whole(self, prompt: Prompt) -> RequestOutput:
        asked, timeout_s = self._asked(prompt), self._timeout_s
        if self._is_chat:
            return await self._client.chat(asked, self._params, timeout_s=timeout_s)
        return await self._client.generate(asked, self._params, timeout_s=timeout_s)

    def _asked(self, prompt: Prompt) -> object:
        if self._is_chat:
            return [{"role": "user", "content": prompt}]
        return prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}

    def _note(self, output: RequestOutput, record: Record) -> None:
        num_new = sum(len(each.token_ids) for each in output.outputs)
        if num_new:
            record.token_s.append(clock())
            record.num_counted_tokens = (record.num_counted_tokens or 0) + num_new
        if output.prompt_token_ids is not None:
            record.num_prompt_tokens = len(output.prompt_token_ids)

    async def close(self) -> None:
        await self._client.close()


def _params(options: BenchOptions) -> SamplingParams:
    kind = RequestOutputKind.DELTA if options.stream else RequestOutputKind.FINAL
    known = {field.name for field in fields(SamplingParams)}
    for name in options.extra:
        if name not in known:
            raise refuse("--extra-body", f"{name!r} is no sampling parameter: leave it out")
    return SamplingParams(
        **{
            "temperature": 0.0,
            "max_tokens": options.output_len,
            "ignore_eos": options.ignore_eos,
            "output_kind": kind,
            **options.extra,
        }
    )
