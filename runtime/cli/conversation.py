"""A chat at the terminal, without the terminal: what was said, how to sample, and the commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from furiosa_llm.errors import FuriosaLLMError, InvalidRequestError
from furiosa_llm.sampling_params import SamplingParams

MAX_FILE_BYTES = 64 << 20

_SETTABLE = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "min_tokens", "stop", "seed", "ignore_eos",
)  # fmt: skip


class Leave(Exception):
    """The user is done."""


class Conversation:
    """What the two sides have said, and the commands that change it.

    Args:
        params: how answers are sampled, to begin with.
        system: the system message; "" for none.
    """

    def __init__(self, params: SamplingParams, system: str = "") -> None:
        self.params = params
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._saved: set[Path] = set()  # files that are ours to write again
        self._commands: dict[str, tuple[str, str, Callable[[str], str]]] = {
            "/help": ("", "show this", self._help),
            "/reset": ("", "forget what was said", self._reset),
            "/retry": ("", "ask the last question again", self._no_retry),
            "/system": ("[TEXT]", "set the system message, or show it; '-' removes it", self._talk),
            "/set": ("[NAME VALUE]", "change a sampling parameter, or show them", self._set),
            "/save": ("FILE", "write the conversation as JSON", self._save),
            "/load": ("FILE", "read one that was saved", self._load),
            "/quit": ("", "leave; so does Ctrl-D", self._quit),
        }

    @property
    def command_names(self) -> list[str]:
        return list(self._commands)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that was said, as a chat's messages."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return system + self._turns

    def ask(self, question: str) -> None:
        """The user says something."""
        self._turns.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        """The model has said something, maybe less than it wanted to."""
        self._turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """The last question could not be answered."""
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()

    def retry(self) -> bool:
        """Forget the last answer. Returns: whether there is a question to ask again."""
        if self._turns and self._turns[-1]["role"] == "assistant":
            self._turns.pop()
        return bool(self._turns)

    def command(self, line: str) -> str:
        """Obey a line that begins with "/". Returns: what to show.

        Raises: Leave; InvalidRequestError, and then nothing has changed.
        """
        name, _, rest = line.partition(" ")
        if name == "/exit":
            name = "/quit"
        if name not in self._commands:
            raise InvalidRequestError(f"{name} is no command: /help shows them")
        return self._commands[name][2](rest.strip())

    def _help(self, rest: str) -> str:
        rows = [
            (f"{name} {form}".rstrip(), text) for name, (form, text, _) in self._commands.items()
        ]
        width = max(len(form) for form, _ in rows) + 2
        lines = [form.ljust(width) + text for form, text in rows]
        return "\n".join(
            [
                *lines,
                "",
                'A line that ends with "\\" goes on in the next one; so does all between two lines',
                'that begin and end with """. Ctrl-C stops an answer.',
            ]
        )

    def _reset(self, rest: str) -> str:
        self._turns.clear()
        return "forgotten"

    def _no_retry(self, rest: str) -> str:
        raise InvalidRequestError("there is no question to ask again")

    def _talk(self, rest: str) -> str:
        if rest:
            self._system = "" if rest == "-" else rest
        return self._system or "there is no system message"

    def _set(self, rest: str) -> str:
        if not rest:
            return "\n".join(f"{name} {_shown(getattr(self.params, name))}" for name in _SETTABLE)
        name, _, text = rest.partition(" ")
        name = name.replace("-", "_").rstrip("=")
        if name not in _SETTABLE:
            raise InvalidRequestError(f"there is no {name} to set: {', '.join(_SETTABLE)}")
        if not text.strip():
            raise InvalidRequestError(
                f"/set {name} what? It is {_shown(getattr(self.params, name))}"
            )
        self.params = dataclasses.replace(self.params, **{name: _value(name, text.strip(" ="))})
        return f"{name} {_shown(getattr(self.params, name))}"

    def _save(self, rest: str) -> str:
        path = _path(rest)
        if path.exists() and path not in self._saved:
            raise InvalidRequestError(f"{path} exists: choose another name, or remove it")
        content = {"messages": self.messages}
        try:
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise FuriosaLLMError(f"{path} cannot be written: {error.strerror}") from None
        self._saved.add(path)
        return f"saved {len(self.messages)} messages to {path}"

    def _load(self, rest: str) -> str:
        path = _path(rest)
        try:
            with path.open("rb") as file:
                content = json.loads(file.read(MAX_FILE_BYTES))
        except OSError as error:
            raise FuriosaLLMError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{path} is not JSON: {error}") from None
        messages = _messages_of(content)
        if messages is None:
            raise InvalidRequestError(f"{path} is not a conversation that /save wrote")
        first = messages[0]["role"] if messages else ""
        self._system = messages.pop(0)["content"] if first == "system" else ""
        self._turns = messages
        return f"{len(self.messages)} messages"

    def _quit(self, rest: str) -> str:
        raise Leave


def _messages_of(content: Any) -> list[dict[str, str]] | None:
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        return None
    read = []
    for message in messages:
        match message:
            case {"role": "system" | "user" | "assistant" as role, "content": str(text)}:
                read.append({"role": role, "content": text})
            case _:
                return None
    return read


def _path(rest: str) -> Path:
    if not rest:
        raise InvalidRequestError("which file? Name one")
    return Path(rest).expanduser().absolute()


def _value(name: str, text: str) -> Any:
    """What the user typed: JSON where it is any, else a text; "none" is None."""
    if text.lower() in ("none", "off"):
        return None if name != "ignore_eos" else False
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shown(value: object) -> str:
    return "none" if value is None or value == () else json.dumps(value)
