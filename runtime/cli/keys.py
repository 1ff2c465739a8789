"""furiosa-serve keys."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("clients", nargs=-1, metavar="[CLIENT]...")
def keys(directory: Path, clients: tuple[str, ...]) -> None:
    """Make keys for a daemon's tcp:// socket, in DIRECTORY.

    The daemon's pair is made if there is none yet, and one for each CLIENT (default: one that is
    called 'client'). Run it again with other names to let in more clients; nothing is overwritten.
    """
    from furiosa_llm.server.key_directory import KeyDirectory

    names = clients or ("client",)
    made = KeyDirectory(directory)
    made.create(names)
    click.echo(
        f"1. Start the daemon with\n"
        f"     --socket tcp://HOST:PORT --curve-key-file {made.daemon_secret} "
        f"--curve-clients-dir {made.clients}\n"
        f"   One that runs with this directory learns of new clients by 'furiosa-serve reload'.\n"
        f"2. Bring to each client its secret key, which nobody else may see, and the daemon's "
        f"public one:"
    )
    for name in names:
        click.echo(f"     {name}: {made.client_secret(name)} {made.daemon_public}")
    name = names[0]
    click.echo(
        f"3. There it connects by\n"
        f"     furiosa-serve chat --connect tcp://HOST:PORT --server-key {made.daemon_public.name} "
        f"--key-file {name}.key_secret\n"
        f"   or in Python by\n"
        f'     Client("tcp://HOST:PORT", curve=CurveKeys("{made.daemon_public.name}", '
        f'"{name}.key_secret"))\n'
        f"4. To shut a client out, delete its file in {made.clients} and reload; a connection that "
        f"is open lives on until it ends."
    )
