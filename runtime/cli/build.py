"""furiosa-serve build."""

from __future__ import annotations

from pathlib import Path

import click

from furiosa_llm.progress import console_progress


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--weights",
    type=click.Choice(["auto", "fp32", "bf16", "int8", "int4"]),
    default="auto",
    show_default=True,
    help="The type of the matrices; auto keeps the model's own precision.",
)
def build(model: str, out: Path, weights: str) -> None:
    """Build MODEL into the artifact directory OUT.

    MODEL is a checkpoint directory (config.json and safetensors), a .gguf file, or the id of a
    known model, which is fetched. OUT must not exist. A build that is interrupted leaves nothing.
    """
    from furiosa_llm.workers.artifact.build import build_artifact
    from furiosa_llm.workers.artifact.known_models import fetch_known_model, find_known_model

    known = None if Path(model).exists() else find_known_model(model)
    with console_progress() as progress:
        source: str | Path = model
        if known is not None:
            from furiosa_llm.args import EngineArgs

            cache_dir = Path(EngineArgs(model=model).cache_dir or ".")
            source = fetch_known_model(known, cache_dir, progress=progress)
        build_artifact(source, out, weights=weights, progress=progress)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    click.echo(f"built {out} ({size / 2**20:.0f} MiB)", err=True)
