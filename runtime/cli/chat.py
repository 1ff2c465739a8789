"""furiosa-serve chat."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from furiosa_llm.cli.conversation import Conversation
    from furiosa_llm.cli.source import Source
    from furiosa_llm.client import AsyncClient

PROMPT, MORE = ">>> ", "... "
MAX_HISTORY_LINES = 1000

_QUOTES = '"""'


# As `generate`: the engine's flags are described once, to argparse.
@click.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def chat(arguments: tuple[str, ...]) -> None:
    """Talk to a model."""
    from furiosa_llm.cli.conversation import Conversation
    from furiosa_llm.cli.sampling_options import sampling_params
    from furiosa_llm.cli.source import source_of
    from furiosa_llm.run_dir import DEFAULT_NAME

    parser = build_parser()
    namespace = parser.parse_args(list(arguments))
    source = source_of(parser, namespace, default=DEFAULT_NAME)
    conversation = Conversation(sampling_params(namespace), namespace.system)
    _run(source, conversation)


def build_parser() -> argparse.ArgumentParser:
    """The command's flags: where the answers come from, the sampling flags, and its own."""
    from furiosa_llm.cli.sampling_options import add_sampling_args
    from furiosa_llm.cli.source import add_source_args

    parser = argparse.ArgumentParser(
        prog="furiosa-serve chat",
        usage="%(prog)s [--name NAME | --connect ADDRESS | --model MODEL] [OPTION ...]",
        description="Talk to a model: of the daemon named default, of another one, or of an engine "
        "of your own. /help shows what can be typed. Lines on standard input, where that is no "
        "terminal, are answered one after the other.",
        allow_abbrev=False,
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    add_sampling_args(parser)
    for action in parser._actions:  # argparse has no other way to change one
        if action.dest == "max_tokens":
            action.default, action.help = None, "tokens per answer (default: as many as fit)"
    add_source_args(parser)
    return parser


def _run(source: Source, conversation: Conversation) -> None:
    from furiosa_llm.cli.source import open_source

    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        opened = open_source(source)
        client = runner.run(opened.__aenter__())
        stack.callback(lambda: runner.run(opened.__aexit__(None, None, None)))
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            stack.enter_context(_history(conversation.command_names))
            model = runner.run(client.status()).model
            click.echo(f"{model}. /help shows what can be typed; Ctrl-D leaves.", err=True)
        Repl(conversation, runner, client, input if is_terminal else _read_line).run()


def _read_line(prompt: str) -> str:
    """As `input`, without the prompt."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


class Repl:
    """Reads what the user types, and shows what comes of it.

    Args:
        read_line: takes a prompt, and returns a line; raises EOFError at the end, and
            KeyboardInterrupt when the user wants none of the line.
    """

    def __init__(
        self,
        conversation: Conversation,
        runner: asyncio.Runner,
        client: AsyncClient,
        read_line: Callable[[str], str],
    ) -> None:
        self._conversation = conversation
        self._runner = runner
        self._client = client
        self._read_line = read_line

    def run(self) -> None:
        """Until the user leaves."""
        from furiosa_llm.cli.conversation import Leave

        while True:
            try:
                text = self._read()
            except EOFError:
                return
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D leaves)", err=True)
                continue
            try:
                self._obey(text)
            except Leave:
                return

    def _read(self) -> str:
        """A line, or several where the first one says so."""
        line = self._read_line(PROMPT)
        if line.startswith(_QUOTES):
            text = line.removeprefix(_QUOTES)
            while not text.rstrip().endswith(_QUOTES):
                text += "\n" + self._read_line(MORE)
            return text.rstrip().removesuffix(_QUOTES).strip("\n")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._read_line(MORE)
        return line

    def _obey(self, text: str) -> None:
        from furiosa_llm.cli.main import print_error
        from furiosa_llm.errors import FuriosaLLMError

        if not text.strip():
            return
        try:
            if text.strip() == "/retry" and self._conversation.retry():
                self._answer()
            elif text.startswith("/"):
                click.echo(self._conversation.command(text.strip()))
            else:
                self._conversation.ask(text)
                self._answer()
        except FuriosaLLMError as error:
            print_error(error)

    def _answer(self) -> None:
        """Show the answer as it comes. Ctrl-C stops it, and what was said until then counts."""
        said: list[str] = []
        try:
            end = self._runner.run(self._stream(said))
        except KeyboardInterrupt:
            end = " (stopped)"
            self._runner.run(self._settle())
        except BaseException:
            click.echo()
            self._conversation.take_back()
            raise
        click.echo(end)
        if said:
            self._conversation.answer("".join(said))
        else:
            self._conversation.take_back()

    async def _stream(self, said: list[str]) -> str:
        """Returns: how to end the line."""
        reason: str | None = None
        stream = self._client.stream_chat(self._conversation.messages, self._conversation.params)
        async with stream:
            async for output in stream:
                for part in output.outputs:
                    said.append(part.text)
                    reason = part.finish_reason
                    sys.stdout.write(part.text)
                sys.stdout.flush()
        return " (cut at max_tokens)" if reason == "length" else ""

    async def _settle(self) -> None:
        """Let the abort arrive: an engine of our own is on the loop that ran the answer."""
        from furiosa_llm.errors import FuriosaLLMError

        with suppress(FuriosaLLMError):
            await self._client.ping(timeout_s=1.0)


def _history(words: list[str]) -> Any:
    """Lines of earlier chats, on the arrow keys; a context manager that keeps this one's."""
    import readline
    from contextlib import contextmanager

    path = history_file()

    @contextmanager
    def kept() -> Any:
        readline.set_history_length(MAX_HISTORY_LINES)
        readline.set_completer_delims("")
        readline.set_completer(lambda text, n: ([w for w in words if w.startswith(text)] + [""])[n])
        readline.parse_and_bind("tab: complete")
        with suppress(OSError):
            readline.read_history_file(path)
        try:
            yield
        finally:
            with suppress(OSError):  # a chat is worth having without it
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.touch(mode=0o600)
                readline.write_history_file(path)

    return kept()


def history_file() -> Path:
    """Where the lines are kept, for this user alone."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "furiosa-serve" / "chat_history"
