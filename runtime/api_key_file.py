"""--api-key-file, of the commands that call a server."""

from __future__ import annotations

from pathlib import Path

from furiosa_llm.checks import refuse


def read_api_key(file: Path) -> str:
    """The key on the first line of the file: on the command line, everybody could see it.

    Raises: InvalidRequestError if there is none.
    """
    try:
        lines = file.read_text(encoding="ascii").split()
    except (OSError, ValueError) as error:
        raise refuse("--api-key-file", f"{file} cannot be read: {error}") from None
    if not lines:
        raise refuse("--api-key-file", f"{file} is empty: write the key on its first line")
    return lines[0]
