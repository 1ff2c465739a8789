"""From the messages of a request to the text of a prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from furiosa_llm.server.errors import invalid, unsupported
from furiosa_llm.server.generation import LONG_TEXT_CHARS
from furiosa_llm.server.service import Service

ROLES = ("system", "developer", "user", "assistant")

_MAX_NAME_CHARS = 64
_OWN_NAMES = frozenset(
    {
        "messages", "conversation", "tools", "documents", "tokenize", "chat_template",
        "add_generation_prompt", "continue_final_message", "return_tensors", "return_dict",
        "raise_exception", "strftime_now", "bos_token", "eos_token", "unk_token", "pad_token",
    }
)  # fmt: skip
"""What the server itself decides about a template's rendering."""


async def render_prompt(
    service: Service,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The prompt of a chat, with its special tokens.

    Args:
        add_generation_prompt: None: unless the last message is to be continued.
    Raises: HttpError (400) whose param says which message is wrong; InvalidRequestError from the
        template.
    """
    if len(messages) > service.limits.max_messages:
        raise invalid(
            f"messages: {len(messages)} are more than {service.limits.max_messages}", "messages"
        )
    if not messages:
        raise invalid("messages: the list is empty: give at least one message", "messages")
    checked = [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    kwargs = _template_kwargs(template_kwargs, service.limits.max_chat_template_kwargs_bytes)
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    render = partial(
        service.engine.tokenizer.apply_chat_template,
        checked,
        chat_template=service.chat_template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **kwargs,
    )
    if sum(len(message["content"]) for message in checked) < LONG_TEXT_CHARS:
        return render()
    return await service.in_text_thread(render)


async def encode_chat(
    service: Service, messages: list[dict[str, Any]], *, continue_final_message: bool = False
) -> list[int]:
    """The token ids of a chat's prompt. Raises: as `render_prompt`."""
    text = await render_prompt(service, messages, continue_final_message=continue_final_message)
    encode = partial(service.engine.tokenizer.encode, text, add_special_tokens=False)
    return encode() if len(text) < LONG_TEXT_CHARS else await service.in_text_thread(encode)


def _message(where: str, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        param = f"{where}.role" if role in ("tool", "function") else f"{where}.tool_calls"
        raise unsupported(param, "tools are not supported in this version")
    if role not in ROLES:
        raise invalid(f"{where}.role: it is not one of {', '.join(ROLES)}", f"{where}.role")
    content = _content(f"{where}.content", message.get("content"))
    # Templates know "system"; "developer" is OpenAI's newer word for it.
    checked = {"role": "system" if role == "developer" else role, "content": content}
    if isinstance(message.get("name"), str):
        checked["name"] = message["name"]
    return checked


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(
            f'{where}: it is neither a string nor a list of parts {{"type": "text", "text": "…"}}',
            where,
        )
    return "".join(_part(f"{where}[{i}]", part) for i, part in enumerate(content))


def _part(where: str, part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise unsupported(
                f"{where}.type", f"{kind[:40]!r} is not supported: only parts of type text are"
            )
    raise invalid(f'{where}: it is not {{"type": "text", "text": "…"}}', where)


def _template_kwargs(kwargs: dict[str, Any] | None, max_bytes: int) -> dict[str, Any]:
    if not kwargs:
        return {}
    for name in kwargs:
        param = f"chat_template_kwargs.{name[:_MAX_NAME_CHARS]}"
        if name in _OWN_NAMES:
            raise invalid(f"{param}: the server sets it itself: leave it out", param)
        if not name.isidentifier() or len(name) > _MAX_NAME_CHARS:
            raise invalid(f"{param}: it is no name of a template's variable", param)
    num_bytes = len(msgspec.json.encode(kwargs))
    if num_bytes > max_bytes:
        raise invalid(
            f"chat_template_kwargs: {num_bytes} bytes of JSON are more than {max_bytes}",
            "chat_template_kwargs",
        )
    return kwargs
