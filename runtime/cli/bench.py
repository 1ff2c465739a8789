"""furiosa-serve bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from furiosa_llm.loadgen.options import BenchOptions
    from furiosa_llm.loadgen.run import Run

DEFAULT_URL = "http://127.0.0.1:8000"


@click.command()
@click.option(
    "--base-url", metavar="URL", help=f"An OpenAI-compatible server. Default: {DEFAULT_URL}"
)
@click.option(
    "--connect",
    metavar="NAME|ENDPOINT",
    help="A daemon of ours over its socket, instead of HTTP.",
)
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="Completions send token ids, chat sends words.",
)
@click.option("--model", metavar="NAME", help="Default: the first that the server lists.")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Closed loop: so many callers, each waiting for its answer. Default: 1",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Open loop: so many requests a second, whatever the server makes of them.",
)
@click.option(
    "--arrivals",
    type=click.Choice(["poisson", "constant"]),
    default="poisson",
    show_default=True,
    help="How the open loop's requests are spaced.",
)
@click.option(
    "--num-requests", type=click.IntRange(min=1), metavar="N", help="Default: 64, or --duration."
)
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Send requests for so many seconds.",
)
@click.option(
    "--warm-up",
    "num_warm_up",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="N",
    help="Requests before, all at once, that do not count.",
)
@click.option(
    "--input-len", type=click.IntRange(min=1), default=128, show_default=True, metavar="TOKENS"
)
@click.option(
    "--output-len", type=click.IntRange(min=1), default=128, show_default=True, metavar="TOKENS"
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of prompts and arrivals. A repeated one meets the server's prefix cache.",
)
@click.option(
    "--prompt-form",
    type=click.Choice(["ids", "text"]),
    help="Of completions. Default: ids, which have exactly the length.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=2),
    default=20_000,
    show_default=True,
    metavar="N",
    help="Prompts are of token ids below it.",
)
@click.option(
    "--no-stream", "stream", is_flag=True, flag_value=False, default=True, help="Whole answers."
)
@click.option(
    "--no-ignore-eos",
    "ignore_eos",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Let answers end by themselves; for servers that refuse the field.",
)
@click.option(
    "--no-keep-alive",
    "keep_alive",
    is_flag=True,
    flag_value=False,
    default=True,
    help="A fresh connection for each request.",
)
@click.option("--extra-body", metavar="JSON", help="Further fields of every request's body.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Its first line is sent as the key.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="S",
    help="For a whole request.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write settings and figures there too; - for standard output, without the table.",
)
def bench(**arguments: Any) -> None:
    """Put a load on a server and measure what its callers get.

    Latencies count from the moment at which a request was due, not from when it could be sent.
    With neither --concurrency nor --rate there is one caller.

    \b
    Exit codes:  0 all requests were answered   1 some failed, or the server cannot be reached
                 2 a wrong option               130 Ctrl-C (the figures so far are shown)
    """
    from furiosa_llm.loadgen.options import BenchOptions

    json_file = arguments.pop("json_file")
    options = BenchOptions.of(default_url=DEFAULT_URL, **arguments)
    sys.exit(_bench(options, json_file))


def _bench(options: BenchOptions, json_file: Path | None) -> int:
    from furiosa_llm.loadgen.bench import Bench, run_loop
    from furiosa_llm.loadgen.report import report_json
    from furiosa_llm.loadgen.summary import Summary

    work = Bench(options, show_progress=_show_progress if sys.stderr.isatty() else None)
    is_interrupted = False
    try:
        run_loop(work.run())
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        if sys.stderr.isatty():
            click.echo("\r\033[K", nl=False, err=True)
    summary = Summary.of(
        work.load.records,
        wanted_tokens=options.output_len,
        client_cpu_s=work.load.client_cpu_s,
    )
    if json_file is None or str(json_file) != "-":
        _print_table(summary, work.describe())
    if json_file is not None:
        text = report_json(work.settings(), summary)
        if str(json_file) == "-":
            click.echo(text)
        else:
            json_file.write_text(text + "\n", encoding="utf-8")
    if is_interrupted:
        return 130
    return 0 if summary.num_ok and not summary.errors else 1


def _print_table(summary: Any, described: str) -> None:
    from rich.console import Console

    from furiosa_llm.loadgen.table import render

    console = Console(highlight=False)
    console.print(described, style="bold", soft_wrap=True)
    console.print(render(summary))


def _show_progress(run: Run) -> None:
    """One line on the terminal, written over itself."""
    ended = sum(record.end_s > 0 for record in run.records)
    failed = sum(record.error is not None for record in run.records)
    pieces = sum(len(record.token_s) for record in run.records)
    line = f"{ended} ended ({failed} failed), {len(run.records) - ended} running, {pieces} pieces"
    click.echo(f"\r\033[K{line}", nl=False, err=True)
