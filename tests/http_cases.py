"""Requests whose answers are stored byte for byte, and how they are sent and written down.

    record(server, CASES[0])    the text that the golden file holds for it

What differs from run to run (ids, times, the fingerprint) is replaced; everything else is as it
came. Answers of the mock backend are a function of the request; `PacedDelivery` keeps a stream from
being read in larger pieces on a busy machine.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from http_server import RunningServer

from furiosa_llm.server.mailbox import Delivery, Item, Mailbox

CHAT = "POST /v1/chat/completions"
TEXT = "POST /v1/completions"
HI = [{"role": "user", "content": "hi"}]
FIXED = {"temperature": 0, "max_tokens": 4}
STREAM = FIXED | {"stream": True}


@dataclass(frozen=True)
class Case:
    name: str
    line: str
    body: Any = None
    """A JSON value, or bytes as they are."""
    headers: dict[str, str] = field(default_factory=dict)


def _chat(name: str, **fields: Any) -> Case:
    return Case(f"chat: {name}", CHAT, {"messages": HI, **FIXED} | fields)


def _text(name: str, **fields: Any) -> Case:
    return Case(f"completion: {name}", TEXT, {"prompt": "hello", **FIXED} | fields)


def _bad(name: str, body: bytes, **headers: str) -> Case:
    return Case(f"bad body: {name}", CHAT, body, headers)


CASES = [
    # whole replies
    _chat("one choice"),
    _chat("the served name is echoed", model="tiny"),
    _chat("two choices", n=2),
    _chat("max_completion_tokens wins", max_completion_tokens=2),
    _chat("logprobs", logprobs=True),
    _chat("top logprobs", logprobs=True, top_logprobs=2),
    _chat("token ids", return_token_ids=True),
    _chat("a stop token", stop_token_ids=[377]),
    _chat("a system message and parts", messages=[
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]),
    _chat("the last message is continued", continue_final_message=True, messages=[
        *HI, {"role": "assistant", "content": "well"},
    ]),
    _chat("unknown fields are named", frobnicate=1, zeta="é", user="me", metadata={"a": "b"}),
    _chat("null is the default", seed=None, stop=None, tools=None, response_format=None),
    _chat("values that ask for nothing", tools=[], response_format={"type": "text"}, store=False),
    _text("text"),
    _text("texts", prompt=["a", "b"]),
    _text("token ids", prompt=[5, 6, 7]),
    _text("lists of token ids", prompt=[[5, 6], [7]]),
    _text("texts, two choices, echoed", prompt=["a", "b"], n=2, echo=True),
    _text("token ids echoed", prompt=[67, 68], echo=True),
    _text("logprobs 0", logprobs=0),
    _text("logprobs 2", logprobs=2),
    _text("returned token ids", return_token_ids=True),
    _text("a stop string", stop=["e"], max_tokens=40),
    _text("a stop string, included", stop=["e"], max_tokens=40, include_stop_str_in_output=True),
    _text("sixteen tokens by default", max_tokens=None),
    _text("best_of equal to n", n=2, best_of=2),
    # streams
    _chat("stream", **STREAM),
    _chat("stream with usage", **STREAM, stream_options={"include_usage": True}),
    _chat("stream with running usage", **STREAM, stream_options={
        "include_usage": True, "continuous_usage_stats": True,
    }),
    _chat("stream, two choices", **STREAM, n=2),
    _chat("stream with logprobs", **STREAM, logprobs=True, top_logprobs=1),
    _chat("stream with token ids", **STREAM, return_token_ids=True),
    _chat("stream of one token", **STREAM | {"max_tokens": 1}),
    _text("stream", **STREAM),
    _text("stream, echoed", **STREAM, echo=True),
    _text("stream, two prompts", **STREAM, prompt=["a", "b"]),
    _text("stream with logprobs", **STREAM, logprobs=1),
    _text("stream with a stop string", **STREAM | {"max_tokens": 40}, stop="e"),
    # refusals
    _chat("unknown model", model="gpt-4"),
    _chat("no messages", messages=[]),
    _chat("messages is a string", messages="hi"),
    _chat("a message is a number", messages=[5]),
    _chat("a role is unknown", messages=[{"role": "wizard", "content": "x"}]),
    _chat("content is missing", messages=[{"role": "user"}]),
    _chat("content is a number", messages=[{"role": "user", "content": 5}]),
    _chat("content is an image", messages=[
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
    ]),
    _chat("a tool's message", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]),
    _chat("tools", tools=[{"type": "function", "function": {"name": "f"}}]),
    _chat("a JSON schema", response_format={"type": "json_schema", "json_schema": {}}),
    _chat("a grammar", structured_outputs={"regex": "a+"}),
    _chat("a template", chat_template="{{ 1 }}"),
    _chat("the template's own variable", chat_template_kwargs={"messages": []}),
    _chat("top_logprobs without logprobs", top_logprobs=2),
    _chat("stream_options without stream", stream_options={"include_usage": True}),
    _chat("max_tokens is 0", max_tokens=0),
    _chat("max_tokens is a string", max_tokens="4"),
    _chat("temperature is negative", temperature=-1),
    _chat("n is too large", n=1000),
    _chat("logit_bias of a word", logit_bias={"word": 1}),
    _chat("too long an answer", max_tokens=5000),
    _chat("too long a prompt", messages=[{"role": "user", "content": "word " * 300}]),
    _text("an empty list", prompt=[]),
    _text("an empty prompt", prompt=""),
    _text("a mixed list", prompt=["a", 5]),
    _text("a token out of range", prompt=[5, 100000]),
    _text("a suffix", suffix="end"),
    _text("best_of", best_of=3),
    _text("an echo with logprobs", echo=True, logprobs=1),
    Case("completion: no prompt", TEXT, {"max_tokens": 1}),
    _bad("nothing", b""),
    _bad("an array", b"[]"),
    _bad("cut short", b'{"messages": ['),
    _bad("a trailing comma", b'{"messages": [],}'),
    _bad("NaN", b'{"temperature": NaN}'),
    _bad("a number too large", b'{"temperature": 1e999}'),
    _bad("a lone surrogate", b'{"user": "\\ud800"}'),
    _bad("no UTF-8", b'{"user": "\xff"}'),
    _bad("nested too deeply", b'{"messages": ' + b"[" * 100_000),
    _bad("a form", b"messages=hi", **{"content-type": "application/x-www-form-urlencoded"}),
    _bad("latin-1", b"{}", **{"content-type": "application/json; charset=latin-1"}),
    _bad("compressed", b"{}", **{"content-encoding": "gzip"}),
    # other routes
    Case("models", "GET /v1/models"),
    Case("a model", "GET /v1/models/tiny"),
    Case("another model", "GET /v1/models/gpt-4"),
    Case("tokenize", "POST /tokenize", {"prompt": "hello", "return_token_strs": True}),
    Case("tokenize a chat", "POST /tokenize", {"messages": HI}),
    Case("tokenize nothing", "POST /tokenize", {}),
    Case("detokenize", "POST /detokenize", {"tokens": [74, 71, 78, 78, 81]}),
    Case("detokenize out of range", "POST /detokenize", {"tokens": [5, 400]}),
    Case("tokenizer info", "GET /tokenizer_info"),
    Case("version", "GET /version"),
    Case("alive", "GET /livez"),
    Case("ready", "GET /readyz"),
    Case("health", "GET /health"),
    Case("started", "GET /startupz"),
    Case("no such route", "GET /v1/nothing"),
    Case("a trailing slash", "POST /v1/chat/completions/", {}),
    Case("a doubled prefix", "POST /v1/v1/chat/completions", {}),
    Case("no prefix", "POST /chat/completions", {}),
    Case("the wrong method", "GET /v1/chat/completions"),
    Case("HEAD", "HEAD /v1/models"),
    Case("HEAD of what is posted", "HEAD /v1/completions"),
    Case("OPTIONS", "OPTIONS /v1/completions"),
]  # fmt: skip


class PacedDelivery(Delivery):
    """Delivers an output only when its reader has taken the one before it."""

    def post(self, mailbox: Mailbox, first_choice: int, item: Item) -> None:
        self._items.append((mailbox, first_choice, item))
        self._loop.call_soon_threadsafe(self._step)

    def _step(self) -> None:
        if not self._items:
            return
        mailbox, first_choice, item = self._items[0]
        if not mailbox._pending:
            self._items.popleft()
            mailbox.put(first_choice, item)
            mailbox.tell()
        self._loop.call_soon(self._step)


def send(server: RunningServer, case: Case) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body)"""
    body = case.body if isinstance(case.body, bytes | None) else json.dumps(case.body).encode()
    method, path = case.line.split(" ")
    headers = ({} if body is None else {"content-type": "application/json"}) | case.headers
    with server.client() as client:
        answer = client.request(method, path, content=body, headers=headers)
        return answer.status_code, dict(answer.headers), answer.content


def record(server: RunningServer, case: Case) -> str:
    status, headers, body = send(server, case)
    text = _normal(body.decode())
    if '"index":1' in text and "data: " in text:
        text = _by_choice(text)
    shown = [f"{name}: {_normal(value)}" for name, value in sorted(headers.items())
             if name not in ("date", "content-length")]  # fmt: skip
    return "\n".join([f"=== {case.name}", f"{status}", *shown, "", text, ""])


_CHANGING = [
    (re.compile(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{32}"'), r'"id":"\1-ID"'),
    (re.compile(r'"request_id":"[0-9a-f]{32}"'), '"request_id":"ID"'),
    (re.compile(r'"created":\d+'), '"created":TIME'),
    (re.compile(r'"system_fingerprint":"fp_[0-9a-f]{16}"'), '"system_fingerprint":"FP"'),
    (re.compile(r'"artifact_id":"[0-9a-f]{32}"'), '"artifact_id":"ARTIFACT"'),
    (re.compile(r"^[0-9a-f]{32}$"), "ID"),
]


def _normal(text: str) -> str:
    for pattern, replacement in _CHANGING:
        text = pattern.sub(replacement, text)
    return text


def _by_choice(text: str) -> str:
    """Chunks of several choices, by choice: which is a step ahead is the worker's affair."""
    found = [(re.search(r'"index":(\d+)', event), event) for event in text.split("\n\n")]
    key = [(int(match[1]) if match else 1000, event) for match, event in found]
    return "\n\n".join(event for _, event in sorted(key, key=lambda pair: pair[0]))
