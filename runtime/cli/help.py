"""furiosa-serve help."""

from __future__ import annotations

import sys

import click

from furiosa_llm.server.options import GROUPS, OPTIONS, Option


@click.command()
@click.argument("word", required=False)
@click.pass_context
def help(ctx: click.Context, word: str | None) -> None:
    """Search for WORD in the commands, in the options of 'furiosa-serve serve', and in what is said
    of them. Without WORD, list all options.

    Exit codes: 0 something was found; 1 nothing was.
    """
    from furiosa_llm.cli.main import command_texts

    texts = command_texts()
    wanted = _normal(word or "")
    commands = [
        (f"furiosa-serve {name}", text)
        for name, text in texts.items()
        if word is not None and (wanted in name or wanted in _normal(text))
    ]
    options = [option for option in OPTIONS.values() if wanted in _searched(option)]
    formatter = ctx.make_formatter()
    if commands:
        with formatter.section("Commands"):
            formatter.write_dl(commands)
    for group in GROUPS:
        rows = [_row(option) for option in options if option.group == group]
        if rows:
            with formatter.section(f"Options of 'furiosa-serve serve': {group}"):
                formatter.write_dl(rows)
    if commands or options:
        click.echo(formatter.getvalue().lstrip("\n"), nl=False)
        return
    from furiosa_llm.server.option_layers import nearest

    near = nearest(wanted.replace(" ", "-"), [*OPTIONS, *texts])
    hint = f": did you mean {near}?" if near else ": 'furiosa-serve help' lists all options"
    click.echo(f"nothing is said of {word!r}{hint}", err=True)
    sys.exit(1)


def _row(option: Option) -> tuple[str, str]:
    return f"{option.flag} {option.metavar}", f"{option.help} [{option.variable}]"


def _searched(option: Option) -> str:
    words = (option.key, option.variable, option.help, option.group)
    return _normal(" ".join(words)) + " " + option.variable.lower() + " " + option.flag


def _normal(text: str) -> str:
    """Dashes and underscores are spaces, so that max-queue and MAX_QUEUE are found alike."""
    return " ".join(text.lower().replace("-", " ").replace("_", " ").split())
