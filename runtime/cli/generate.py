"""furiosa-serve generate."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from furiosa_llm.args import AsyncEngineArgs
    from furiosa_llm.cli.source import Source
    from furiosa_llm.client import AsyncClient
    from furiosa_llm.outputs import RequestOutput
    from furiosa_llm.sampling_params import SamplingParams
    from furiosa_llm.text.tokenizer import Tokenizer


# The engine's flags are defined once, for argparse, where Furiosa-LLM's users expect them
# (`AsyncEngineArgs.add_cli_args`). Hence this command hands its arguments on to such a parser
# instead of describing them to click a second time.
@click.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def generate(arguments: tuple[str, ...]) -> None:
    """Answer prompts, streaming to the terminal."""
    from furiosa_llm.cli.sampling_options import sampling_params
    from furiosa_llm.cli.source import source_of

    parser = build_parser()
    namespace = parser.parse_intermixed_args(list(arguments))
    source = source_of(parser, namespace, default=None)
    params = sampling_params(namespace)
    prompts = namespace.prompts or [_read_prompt()]
    if source.engine_args is None:
        asyncio.run(_run_remote(source, params, prompts, namespace.is_chat))
    else:
        asyncio.run(_run(source.engine_args, params, prompts, namespace.is_chat))


def build_parser() -> argparse.ArgumentParser:
    """The command's flags: the engine's, the sampling flags, and its own."""
    from furiosa_llm.cli.sampling_options import add_sampling_args
    from furiosa_llm.cli.source import add_source_args

    parser = argparse.ArgumentParser(
        prog="furiosa-serve generate",
        usage="%(prog)s (--model MODEL | --name NAME | --connect ADDRESS) [OPTION ...] "
        "[PROMPT ...]",
        description="Answer prompts, all at once, streaming to the terminal. Figures and errors "
        "go to standard error.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="several are answered at once and shown in order; without any, standard input is read",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat",
        dest="is_chat",
        action="store_true",
        default=None,
        help="ask the prompts as a user (default where the model has a chat template)",
    )
    form.add_argument(
        "--raw", dest="is_chat", action="store_false", help="let the model go on with the prompts"
    )
    add_sampling_args(parser)
    add_source_args(parser)
    return parser


def _read_prompt() -> str:
    if sys.stdin.isatty():
        click.echo("Type the prompt, then Ctrl-D:", err=True)
    prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise click.UsageError("there is no prompt: give one as an argument or on standard input")
    return prompt


async def _run(
    engine_args: AsyncEngineArgs,
    params: SamplingParams,
    prompts: Sequence[str],
    is_chat: bool | None,
) -> None:
    from furiosa_llm.cli.live import show_answers
    from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine

    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        if is_chat is None:
            is_chat = engine.tokenizer.has_chat_template
        shown = _Shown(prompts)
        inputs = [_chat_prompt(engine.tokenizer, p) if is_chat else p for p in prompts]
        figures = await show_answers(engine, inputs, params, begin=shown.begin, write=shown.write)
        shown.end()
    click.echo(figures.line(), err=True)


async def _run_remote(
    source: Source, params: SamplingParams, prompts: Sequence[str], is_chat: bool | None
) -> None:
    from furiosa_llm.cli.live import show_answers
    from furiosa_llm.cli.source import open_source

    async with open_source(source) as client:
        if is_chat is None:
            is_chat = bool((await client.status()).raw.get("has_chat_template"))
        shown = _Shown(prompts)
        figures = await show_answers(
            _Remote(client, is_chat), prompts, params, begin=shown.begin, write=shown.write
        )
        shown.end()
    click.echo(figures.line(), err=True)


class _Remote:
    """A daemon as `show_answers` wants an engine: its ids are ours alone, so they are made up."""

    def __init__(self, client: AsyncClient, is_chat: bool) -> None:
        self._client = client
        self._is_chat = is_chat

    async def generate(
        self, prompt: str, params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        if self._is_chat:
            stream = self._client.stream_chat([{"role": "user", "content": prompt}], params)
        else:
            stream = self._client.stream_generate(prompt, params)
        async with stream:
            async for output in stream:
                yield output


def _chat_prompt(tokenizer: Tokenizer, prompt: str) -> dict[str, Any]:
    return {"prompt_token_ids": tokenizer.encode_chat([{"role": "user", "content": prompt}])}


class _Shown:
    """What standard output holds: one answer bare, or several, each below its prompt."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._prompts = prompts
        self._last = "\n"  # how the output ends; nothing needs no line break

    def begin(self, index: int) -> None:
        if len(self._prompts) > 1:
            self.end()
            gap = "\n" if index else ""
            self.write(f"{gap}>>> {self._prompts[index]}\n")

    def write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._last = text[-1]

    def end(self) -> None:
        if self._last != "\n":
            self.write("\n")
