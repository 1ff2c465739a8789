"""Fields that clients of other servers send and this one does not honour.

Silence would be a wrong answer: a caller who asked for a JSON schema and gets prose has to find out
why. So each is refused by name unless it holds a value that asks for nothing. Fields that nobody
knows are no errors; the response names them in `X-Ignored-Params`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from furiosa_llm.server.errors import unsupported
from furiosa_llm.server.json_body import JsonBody

IGNORED_PARAMS_HEADER = b"x-ignored-params"
MAX_IGNORED_CHARS = 1024

NO_TOOLS = "tools are not supported in this version: leave it out"
_NO_STRUCTURE = "structured output is not supported in this version: leave it out"
NO_REASONING = "reasoning is not parsed in this version: leave it out"
_TEXT_ONLY = "only text is supported: leave it out"
_NO_STORE = "nothing is stored: leave it out"
NOT_HERE = "it is not supported in this version: leave it out"

Unsupported = Mapping[str, tuple[tuple[Any, ...], str]]
"""By name: the values that ask for nothing, besides null; why others are refused."""

_UNSUPPORTED: Unsupported = {
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "response_format": (({"type": "text"},), _NO_STRUCTURE),
    "structured_outputs": ((), _NO_STRUCTURE),
    "guided_decoding": ((), _NO_STRUCTURE),
    "guided_json": ((), _NO_STRUCTURE),
    "guided_regex": ((), _NO_STRUCTURE),
    "guided_choice": ((), _NO_STRUCTURE),
    "guided_grammar": ((), _NO_STRUCTURE),
    "grammar": (("",), _NO_STRUCTURE),
    "reasoning_effort": (("none",), NO_REASONING),
    "include_reasoning": ((False,), NO_REASONING),
    "modalities": ((["text"],), _TEXT_ONLY),
    "audio": ((), _TEXT_ONLY),
    "mm_processor_kwargs": (({},), _TEXT_ONLY),
    "prediction": ((), NOT_HERE),
    "web_search_options": ((), NOT_HERE),
    "store": ((False,), _NO_STORE),
    "service_tier": (("auto", "default"), "there is one tier: leave it out"),
    "verbosity": (("medium",), NOT_HERE),
    "prompt_logprobs": ((False,), NOT_HERE),
    "echo": ((False,), "a chat is not echoed: leave it out"),
    "suffix": (("",), "filling in is not supported in this version: leave it out"),
    "use_beam_search": ((False,), "there is no beam search in this version: leave it out"),
    "length_penalty": ((1, 1.0), "there is no beam search in this version: leave it out"),
    "early_stopping": ((False,), "there is no beam search in this version: leave it out"),
    "bad_words": (([],), NOT_HERE),
    "allowed_token_ids": ((), NOT_HERE),
    "truncate_prompt_tokens": ((), "prompts are never cut: leave it out and shorten the prompt"),
    "prompt_embeds": ((), NOT_HERE),
    "documents": (([],), NOT_HERE),
    "chat_template": (
        (),
        "a template from a request is not rendered: the server's operator sets one by "
        "--chat-template",
    ),
    "priority": ((0,), NOT_HERE),
    "cache_salt": (("",), NOT_HERE),
    "lora_request": ((), NOT_HERE),
    "kv_transfer_params": ((), NOT_HERE),
}

_ACCEPTED = {
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
"""Fields that ask for nothing that changes an answer without tools or a remote cache."""


def check_fields(
    body: JsonBody, known: Iterable[str], also: Unsupported | None = None
) -> list[tuple[bytes, bytes]]:
    """Refuse what is known and unsupported.

    Args:
        known: the names that the endpoint itself looks at.
        also: further unsupported fields of the endpoint, or others in place of the common ones.
    Returns: the headers that name what is ignored; none if nothing is.
    Raises: HttpError (400).
    """
    ignored = []
    for name in sorted(body.names.difference(known, _ACCEPTED)):
        row = (also or {}).get(name) or _UNSUPPORTED.get(name)
        if row is None:
            ignored.append(name)
            continue
        neutral, reason = row
        value = body.value(name)
        if value is not None and not any(_is_same(value, each) for each in neutral):
            raise unsupported(name, reason)
    return [(IGNORED_PARAMS_HEADER, _header_value(ignored))] if ignored else []


def _is_same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _header_value(names: list[str]) -> bytes:
    """A list of names as a header: what is not a plain name is written with escapes."""
    escaped = (name[:64].encode("unicode_escape").replace(b",", b"\\x2c") for name in names)
    return b", ".join(escaped)[:MAX_IGNORED_CHARS]
