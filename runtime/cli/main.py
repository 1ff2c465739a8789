"""furiosa-serve: the command that the others hang on.

A sub-command's module is imported when it is run or its own help is asked for, so that
`furiosa-serve --help` and `version` load neither numpy nor a tokenizer.

Exit codes: 0 done; 1 it failed; 2 what the user gave was wrong; 130 Ctrl-C. An error is one line.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from furiosa_llm import __version__
from furiosa_llm.errors import FuriosaLLMError

# name -> (module, what `--help` says of it; the module is not there to ask)
_COMMANDS = {
    "build": ("furiosa_llm.cli.build", "Build a model into an artifact."),
    "devices": ("furiosa_llm.cli.devices", "Show the devices and how a --devices is resolved."),
    "generate": ("furiosa_llm.cli.generate", "Answer prompts, streaming to the terminal."),
    "version": ("furiosa_llm.cli.version", "Show the version."),
}


class LazyGroup(click.Group):
    """A group whose commands are named here and live elsewhere."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(_COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what it raises becomes one line and an exit code."""
        try:
            return super().invoke(ctx)
        except FuriosaLLMError as error:
            print_error(error)
            ctx.exit(exit_code_of(error))
        except KeyboardInterrupt:
            ctx.exit(130)


def print_error(error: FuriosaLLMError) -> None:
    """The error as one line on standard error."""
    click.echo("error: " + " ".join(str(error).split()), err=True)


def exit_code_of(error: FuriosaLLMError) -> int:
    """2 where the input was wrong, 1 where the work failed."""
    return 2 if isinstance(error, ValueError) else 1


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="furiosa-serve", message="%(prog)s %(version)s")
def main() -> None:
    """Serve large language models, one worker process per data-parallel group."""
