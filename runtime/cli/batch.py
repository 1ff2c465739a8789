"""furiosa-serve batch."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from furiosa_llm.cli.batch_answers import Answerer
    from furiosa_llm.cli.batch_files import BatchLine, InputFile, OutputFile
    from furiosa_llm.cli.source import Source
    from furiosa_llm.progress import Progress

DEFAULT_CONCURRENCY = 64
MAX_CONCURRENCY = 1024
"""What one client of a daemon may have running."""


# As `generate`: the engine's flags are described once, to argparse.
@click.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def batch(arguments: tuple[str, ...]) -> None:
    """Answer a file of requests."""
    from furiosa_llm.cli.batch_files import InputFile, OutputFile
    from furiosa_llm.cli.source import source_of
    from furiosa_llm.progress import console_progress
    from furiosa_llm.run_dir import DEFAULT_NAME

    parser = build_parser()
    namespace = parser.parse_intermixed_args(list(arguments))
    source = source_of(parser, namespace, default=DEFAULT_NAME)
    if not 0 < namespace.concurrency <= MAX_CONCURRENCY:
        parser.error(f"--concurrency: {namespace.concurrency} is not from 1 to {MAX_CONCURRENCY}")
    requests = InputFile.check(namespace.input)
    with OutputFile(namespace.output) as output, console_progress() as progress:
        num_skipped = sum(line.custom_id in output.answered for line in requests.lines())
        run = _Run(requests, output, progress, num_done=num_skipped)
        if num_skipped < requests.num_lines:
            asyncio.run(run.all(source, namespace.concurrency))
    skipped = f", {num_skipped} of them by an earlier run" if num_skipped else ""
    failed = f"; {run.num_failed} were answered by an error" if run.num_failed else ""
    click.echo(f"{requests.num_lines} requests answered{skipped}{failed}", err=True)
    if run.num_failed:
        sys.exit(1)


def build_parser() -> argparse.ArgumentParser:
    """The command's flags: where the answers come from, and its own."""
    from furiosa_llm.cli.source import add_source_args

    parser = argparse.ArgumentParser(
        prog="furiosa-serve batch",
        usage="%(prog)s IN.jsonl OUT.jsonl [--name NAME | --connect ADDRESS | --model MODEL] "
        "[OPTION ...]",
        description="Answer each line of IN, in OpenAI's batch format (custom_id, method, url, "
        "body), by a line of OUT, in the order in which they are done. Run the same command again "
        "to go on after whatever ended it: what OUT answers is skipped. Exit codes: 0 all lines "
        "have an answer; 1 some answers of this run are errors, or it could not go on; 2 what was "
        "given is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="the requests")
    parser.add_argument("output", type=Path, metavar="OUT.jsonl", help="the answers")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help=f"lines in work at a time (default: {DEFAULT_CONCURRENCY})",
    )
    add_source_args(parser)
    return parser


class _Run:
    """One run over a batch."""

    def __init__(
        self, requests: InputFile, output: OutputFile, progress: Progress, *, num_done: int
    ) -> None:
        self.num_failed = 0
        self._num_done = num_done
        self._requests = requests
        self._output = output
        self._progress = progress

    async def all(self, source: Source, concurrency: int) -> None:
        """Answer what is not answered yet.

        Raises: what keeps it from going on; what is in work then is asked again by the next run.
        """
        from furiosa_llm.cli.batch_answers import Answerer
        from furiosa_llm.cli.source import open_source

        async with open_source(source) as client:
            status = (await client.status()).raw
            answerer = Answerer(client, status["served_model_names"])
            lines = (
                line
                for line in self._requests.lines()
                if line.custom_id not in self._output.answered
            )
            self._show()
            workers = [
                asyncio.ensure_future(self._work(answerer, lines)) for _ in range(concurrency)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, answerer: Answerer, lines: Iterator[BatchLine]) -> None:
        for line in lines:  # shared: each worker takes the next one
            answer = await answerer.answer(line)
            self._output.write(answer)
            self._num_done += 1
            self.num_failed += answer["response"]["status_code"] != 200
            self._show()

    def _show(self) -> None:
        self._progress("batch", self._num_done, self._requests.num_lines)
