"""The options of `furiosa-serve serve` on the command line: flags, help in groups, completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from furiosa_llm.server.options import GROUPS, OPTIONS, Option, is_switch

EPILOG = (
    "Every option can also be given as an environment variable (--max-queue is "
    "FURIOSA_SERVE_MAX_QUEUE) and in a file (max-queue): a flag goes before a variable, a variable "
    "before the file, the file before the default. 'furiosa-serve config show' says which it was, "
    "'furiosa-serve help WORD' searches. Numbers may be written as 8k or 2GiB, times as 500ms or 2m"
)


class GroupedCommand(click.Command):
    """A command whose help shows the table's options in their groups, its own ones last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows_of: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        own = []
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is None or isinstance(param, click.Argument):
                continue
            key = param.opts[0].removeprefix("--")
            if key in OPTIONS:
                rows_of[OPTIONS[key].group].append(row)
            else:
                own.append(row)
        for group, rows in rows_of.items():
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)
        with formatter.section("Other"):
            formatter.write_dl(own)


def with_serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add MODEL, --config and a flag for every row of the table but --model, which MODEL is."""
    for option in reversed(list(OPTIONS.values())):
        command = _flag(option)(command)
    command = click.option(
        "--config",
        metavar="FILE",
        shell_complete=_complete_file,
        help="a TOML or YAML file of options; also FURIOSA_SERVE_CONFIG",
    )(command)
    return click.argument("model_argument", metavar="[MODEL]", required=False)(command)


def given_flags(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The text of each flag that was given, by key, taken from a command's arguments."""
    flags = {
        key: arguments[_parameter(key)]
        for key in OPTIONS
        if arguments.get(_parameter(key)) is not None
    }
    model = arguments.get("model_argument")
    if model is not None and flags.setdefault("model", model) != model:
        raise click.UsageError(f"MODEL is {model!r} but --model is {flags['model']!r}")
    return flags


def _flag(option: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    keywords: dict[str, Any] = {}
    if is_switch(option):
        keywords = {"is_flag": False, "flag_value": "true"}
    elif option.choices:
        keywords = {"shell_complete": _complete_choice(option.choices)}
    elif option.metavar in ("FILE", "DIR", "PATH", "MODEL"):
        keywords = {"shell_complete": _complete_file}
    return click.option(
        option.flag, _parameter(option.key), metavar=option.metavar, help=option.help, **keywords
    )


def _parameter(key: str) -> str:
    """The name of the flag among a command's arguments."""
    return "flag_" + key.replace("-", "_")


def _complete_file(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


def _complete_choice(choices: tuple[str, ...]) -> Callable[..., list[str]]:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete.lower())]

    return complete
