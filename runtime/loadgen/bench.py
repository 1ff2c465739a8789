"""One bench from options to records: find the target, warm it up, put the load on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict
from typing import Any

from furiosa_llm.loadgen.arrivals import due_times
from furiosa_llm.loadgen.http_target import HttpRequests, HttpTarget, first_model
from furiosa_llm.loadgen.options import BenchOptions
from furiosa_llm.loadgen.prompts import text_prompts, token_id_prompts
from furiosa_llm.loadgen.run import Extent, Run
from furiosa_llm.loadgen.target import Prompt, Target, TargetError

PROGRESS_INTERVAL_S = 0.5


class Bench:
    """Run it once; then `load` holds the records, those of a run that was cut short too."""

    def __init__(
        self, options: BenchOptions, *, show_progress: Callable[[Run], None] | None = None
    ) -> None:
        self._options = options
        self._show_progress = show_progress
        self._model = options.model
        self.load = Run()

    async def run(self) -> None:
        """Raises: TargetError if the server cannot be reached, or answers none of the warm-up."""
        options = self._options
        target = await self._target()
        progress = None
        try:
            prompts = self._prompts()
            await self._warm_up(target, prompts)
            if self._show_progress is not None:
                progress = asyncio.create_task(self._report(self._show_progress))
            extent = Extent(options.num_requests, options.duration_s)
            if options.rate is None:
                assert options.concurrency is not None
                await self.load.closed(target, prompts, extent, concurrency=options.concurrency)
            else:
                due = due_times(options.rate, process=options.arrivals, seed=options.seed)
                await self.load.open(target, prompts, extent, due)
        finally:
            if progress is not None:
                progress.cancel()
            await target.close()

    async def _target(self) -> Target:
        options = self._options
        if options.url is None:
            from furiosa_llm.loadgen.socket_target import SocketTarget

            assert options.connect is not None
            return await SocketTarget.connect(options)
        key = options.api_key
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        if self._model is None:
            self._model = await first_model(options.url, headers)
        requests = HttpRequests(
            endpoint=options.endpoint,
            model=self._model,
            max_tokens=options.output_len,
            ignore_eos=options.ignore_eos,
            stream=options.stream,
            extra=options.extra,
        )
        return HttpTarget(
            options.url,
            requests,
            headers=headers,
            keep_alive=options.keep_alive,
            timeout_s=options.timeout_s,
        )

    def _prompts(self) -> Iterator[Prompt]:
        options = self._options
        if options.prompt_form == "ids":
            return token_id_prompts(
                options.input_len, seed=options.seed, vocab_size=options.vocab_size
            )
        return text_prompts(options.input_len, seed=options.seed)

    async def _warm_up(self, target: Target, prompts: Iterator[Prompt]) -> None:
        count = self._options.num_warm_up
        if count == 0:
            return
        run = Run()
        await run.closed(target, prompts, Extent(num_requests=count), concurrency=count)
        if not any(record.is_ok for record in run.records):
            first = run.records[0]
            raise TargetError(
                f"the server answers none of the {count} requests that warm it up: "
                f"{first.error}: {first.detail}"
            )

    async def _report(self, show_progress: Callable[[Run], None]) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            show_progress(self.load)

    def settings(self) -> dict[str, Any]:
        """The options as plain values, without the key."""
        settings = asdict(self._options)
        del settings["api_key"]
        return settings | {"url": self._where(), "model": self._model}

    def describe(self) -> str:
        """One line on what is measured."""
        options = self._options
        if options.rate is None:
            load = f"{options.concurrency} at a time"
        else:
            load = f"{options.rate:g} requests/s ({options.arrivals})"
        model = f"{self._model} at " if self._model else ""
        return (
            f"{model}{self._where()}: {load}, {options.input_len} tokens in, "
            f"{options.output_len} out"
        )

    def _where(self) -> str:
        if self._options.url is None:
            return f"socket {self._options.connect}"
        return f"{self._options.url} ({self._options.endpoint})"


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """asyncio.run on the fastest loop there is."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)
