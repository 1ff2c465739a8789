"""The engine's refusals, in the words of an endpoint that calls its fields otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from furiosa_llm.errors import InvalidRequestError


@contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Raise what is raised inside with the caller's names of fields.

    Args:
        names: the caller's name by the engine's.
    """
    try:
        yield
    except InvalidRequestError as error:
        ours = error.param
        if ours is None or ours not in names:
            raise
        theirs = names[ours]
        # A message begins with its field; a name such as max_tokens may stand anywhere in it, but
        # "prompt" and "stop" are words of the sentence there.
        where = r"\b{}\b" if "_" in ours else "^{}(?=:)"
        message = re.sub(where.format(re.escape(ours)), theirs, str(error))
        raise type(error)(message, param=theirs) from error
