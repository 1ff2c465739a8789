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
    "serve": ("furiosa_llm.cli.serve", "Serve a model in the foreground."),
    "start": ("furiosa_llm.cli.start", "Start a daemon in the background."),
    "stop": ("furiosa_llm.cli.stop", "Let a daemon's requests end, then end it."),
    "restart": ("furiosa_llm.cli.restart", "Stop a daemon and start it again the same way."),
    "status": ("furiosa_llm.cli.status", "Show a daemon's state, addresses and workers."),
    "logs": ("furiosa_llm.cli.logs", "Show what a daemon in the background said."),
    "drain": ("furiosa_llm.cli.drain", "Have a daemon take no more requests."),
    "reload": ("furiosa_llm.cli.reload", "Read keys and certificates again, replace the workers."),
    "build": ("furiosa_llm.cli.build", "Build a model into an artifact."),
    "devices": ("furiosa_llm.cli.devices", "Show the devices and how a --devices is resolved."),
    "generate": ("furiosa_llm.cli.generate", "Answer prompts, streaming to the terminal."),
    "chat": ("furiosa_llm.cli.chat", "Talk to a model."),
    "batch": ("furiosa_llm.cli.batch", "Answer a file of requests, in OpenAI's batch format."),
    "bench": ("furiosa_llm.cli.bench", "Put a load on a server and measure its callers' waits."),
    "top": ("furiosa_llm.cli.top", "Watch a server's workers, queues and tokens/s."),
    "keys": ("furiosa_llm.cli.keys", "Make keys for a socket that other machines reach."),
    "config": ("furiosa_llm.cli.config", "Show each option's value and where it came from."),
    "doctor": ("furiosa_llm.cli.doctor", "Check this machine, and say how to fix what is wrong."),
    "help": ("furiosa_llm.cli.help", "Search the options and commands for a word."),
    "completion": ("furiosa_llm.cli.completion", "Print the completion script of a shell."),
    "version": ("furiosa_llm.cli.version", "Show the version."),
}

# What `--help` puts together; commands that are in none of them come last.
_SECTIONS = {
    "Serving": ("serve", "start", "stop", "restart", "status", "logs", "drain", "reload"),
    "Using": ("generate", "chat", "batch", "bench", "top"),
    "Models and machine": ("build", "devices", "doctor", "config", "keys"),
}


def command_texts() -> dict[str, str]:
    """What `--help` says of each command, by name."""
    return {name: text for name, (_, text) in _COMMANDS.items()}


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
        placed = {name for names in _SECTIONS.values() for name in names}
        rest = tuple(name for name in _COMMANDS if name not in placed)
        for section, names in {**_SECTIONS, "Other": rest}.items():
            rows = [(name, _COMMANDS[name][1]) for name in names if name in _COMMANDS]
            if rows:
                with formatter.section(section):
                    formatter.write_dl(rows)

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
    """2 where the input was wrong, 1 where the work failed, or what the error itself says."""
    own: int | None = getattr(error, "exit_code", None)
    if own is not None:
        return own
    return 2 if isinstance(error, ValueError) else 1


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="furiosa-serve", message="%(prog)s %(version)s")
def main() -> None:
    """Serve large language models, one worker process per data-parallel group."""
