"""What a bench is asked to do, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furiosa_llm.api_key_file import read_api_key
from furiosa_llm.checks import refuse
from furiosa_llm.loadgen.http_url import HttpUrl

DEFAULT_NUM_REQUESTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The flags of `furiosa-serve bench`, with what they leave open filled in."""

    url: HttpUrl | None  # None: over our socket, to `connect`
    connect: str | None
    endpoint: str
    model: str | None
    concurrency: int | None  # None: open loop, at `rate`
    rate: float | None
    arrivals: str
    num_requests: int | None
    duration_s: float | None
    num_warm_up: int
    input_len: int
    output_len: int
    seed: int
    prompt_form: str  # "ids" or "text"
    vocab_size: int
    stream: bool
    ignore_eos: bool
    keep_alive: bool
    extra: Mapping[str, Any]
    api_key: str | None
    timeout_s: float

    @classmethod
    def of(
        cls,
        *,
        default_url: str,
        base_url: str | None,
        connect: str | None,
        endpoint: str,
        concurrency: int | None,
        rate: float | None,
        num_requests: int | None,
        duration_s: float | None,
        prompt_form: str | None,
        extra_body: str | None,
        api_key_file: Path | None,
        **others: Any,
    ) -> BenchOptions:
        """The options that the flags come to. Raises: InvalidRequestError if they do not fit."""
        if base_url is not None and connect is not None:
            raise refuse("--connect", "it goes over the socket and --base-url over HTTP: give one")
        if concurrency is not None and rate is not None:
            raise refuse("--rate", "it is an open loop's, --concurrency a closed one's: give one")
        if endpoint == "chat" and prompt_form == "ids":
            raise refuse("--prompt-form", "chat takes no token ids: use text, or completions")
        if num_requests is None and duration_s is None:
            num_requests = DEFAULT_NUM_REQUESTS
        return cls(
            url=None if connect else HttpUrl.parse("--base-url", base_url or default_url),
            connect=connect,
            endpoint=endpoint,
            concurrency=(concurrency or 1) if rate is None else None,
            rate=rate,
            num_requests=num_requests,
            duration_s=duration_s,
            prompt_form="text" if endpoint == "chat" else prompt_form or "ids",
            extra=_read_extra(extra_body),
            api_key=None if api_key_file is None else read_api_key(api_key_file),
            **others,
        )


def _read_extra(text: str | None) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        extra = json.loads(text)
    except ValueError as error:
        raise refuse("--extra-body", f"{text[:80]!r} is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise refuse("--extra-body", f"{text[:80]!r} is not a JSON object like '{{\"top_k\": 1}}'")
    return extra
