"""furiosa-serve completion."""

from __future__ import annotations

import click

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, options, files and daemons' names.

    \b
    bash:  echo 'eval "$(furiosa-serve completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(furiosa-serve completion zsh)"' >> ~/.zshrc
    fish:  furiosa-serve completion fish > ~/.config/fish/completions/furiosa-serve.fish
    """
    from click.shell_completion import get_completion_class

    from furiosa_llm.cli.main import main

    kind = get_completion_class(shell)
    assert kind is not None, "click knows all three"
    click.echo(kind(main, {}, "furiosa-serve", "_FURIOSA_SERVE_COMPLETE").source())
