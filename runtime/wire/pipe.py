"""How a worker gets its `Configure`: one frame on its standard input, before any socket exists."""

from __future__ import annotations

import struct
from typing import BinaryIO

from furiosa_llm.wire.codec import MAX_MESSAGE_BYTES, decode_configure, encode
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import Configure

_LENGTH = struct.Struct("<I")


def pack_configure(configure: Configure) -> bytes:
    """What the front-end writes to a new worker's standard input: the length, then the message."""
    data = encode(configure)
    return _LENGTH.pack(len(data)) + data


def read_configure(pipe: BinaryIO) -> Configure:
    """Block until the whole frame is there, and read not a byte more.

    Raises: EOFError if the pipe ends before the frame does; WireError if it holds anything else.
    """
    (num_bytes,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))
    if num_bytes > MAX_MESSAGE_BYTES:
        raise WireError(f"a frame of {num_bytes} bytes is over {MAX_MESSAGE_BYTES}")
    return decode_configure(_read_exactly(pipe, num_bytes))


def _read_exactly(pipe: BinaryIO, num_bytes: int) -> bytes:
    chunks: list[bytes] = []
    while num_bytes > 0:
        chunk = pipe.read(num_bytes)  # a raw pipe may give less than was asked for
        if not chunk:
            raise EOFError(f"the pipe ended {num_bytes} bytes before its frame did")
        chunks.append(chunk)
        num_bytes -= len(chunk)
    return b"".join(chunks)
