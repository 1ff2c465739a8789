"""What one request may ask for, and how many there may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests; each is refused by name when it is passed."""

    max_body_bytes: int = 8 << 20
    """A longer body is refused (413) before it has been read.

    JSON is decoded on the event loop, 3 to 11 ns a byte where it is full of escapes, and a thread
    would not help: the decoder keeps the GIL. This holds up the other streams for less than 0.1 s,
    and is more than ten times what fills a context of 128k tokens."""
    max_queue: int = 1024
    """Requests that may wait beyond those that can run at once; more are refused (429)."""
    max_prompts: int = 1024
    """Prompts of one completion request."""
    max_choices: int = 1024
    """Prompts times `n` of one request."""
    max_messages: int = 4096
    """Messages of one chat."""
    max_chat_template_kwargs_bytes: int = 16 << 10
    """Of `chat_template_kwargs`, written as JSON."""
