"""furiosa-serve devices."""

from __future__ import annotations

import click

from furiosa_llm.devices import parse_devices
from furiosa_llm.groups import form_groups
from furiosa_llm.topology import discover_topology


@click.command()
@click.option("--devices", "spec", metavar="LIST", help="Such as npu:0,npu:1:0-3 or cpu.")
@click.option(
    "--data-parallel-size", type=click.IntRange(min=1), metavar="N", help="How many groups."
)
@click.option(
    "--tensor-parallel-size", type=click.IntRange(min=1), metavar="N", help="PEs per group."
)
def devices(
    spec: str | None, data_parallel_size: int | None, tensor_parallel_size: int | None
) -> None:
    """Show the cards and PEs, and which of them each worker would get.

    A card is a NUMA node and a PE one of its cores. Without options every card is one group, which
    one worker process serves.
    """
    topology = discover_topology()
    groups = form_groups(
        None if spec is None else parse_devices(spec),
        topology,
        data_parallel_size=data_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
    )
    for card in topology.cards:
        click.echo(f"card {card}: {len(card.pes)} PE{'' if len(card.pes) == 1 else 's'}")
        for pe in card.pes:
            click.echo(f"  {pe}  CPU {_joined(pe.cpus)}")
    for group in groups:
        cpus = sorted(set().union(*group.cpus))
        click.echo(f"group {group.index}: {group}  CPU {_joined(cpus)}")


def _joined(cpus: list[int] | tuple[int, ...]) -> str:
    return ",".join(map(str, cpus))
