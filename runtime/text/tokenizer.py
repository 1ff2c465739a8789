"""The tokenizer of a model: text to token ids and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from furiosa_llm.errors import InvalidRequestError
from furiosa_llm.text.tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    from furiosa_llm.text.pieces import PieceTable

MODES = ("auto", "slow")


class Backend(Protocol):
    """A library's tokenizer: what `Tokenizer` needs of it."""

    vocab_size: int
    special_ids: frozenset[int]
    pieces: PieceTable | None  # what each token adds to the text, where that is known

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def token_id(self, token: str) -> int | None: ...


class Tokenizer:
    """Thread-safe: nothing is changed after construction but caches."""

    def __init__(self, backend: Backend, files: TokenizerFiles) -> None:
        self._backend = backend
        self._files = files

    @classmethod
    def from_directory(cls, path: str | Path, mode: str = "auto") -> Tokenizer:
        """Load the tokenizer of a checkpoint or of an artifact's `tokenizer/` directory.

        Args:
            path: a directory with a tokenizer.json (mode "auto").
            mode: "auto", the fast tokenizer; "slow", transformers' Python one, where the model
                still has such a one.
        Raises: ArtifactError if there is none or it is damaged; InvalidRequestError if the mode is
            unknown or the model has no slow tokenizer.
        """
        directory = Path(path)
        if mode == "auto":
            from furiosa_llm.text.fast_backend import FastBackend

            return cls(FastBackend.load(directory), TokenizerFiles.read(directory))
        if mode == "slow":
            from furiosa_llm.text.slow_backend import SlowBackend

            return cls(SlowBackend.load(directory), TokenizerFiles.read(directory))
        raise InvalidRequestError(
            f"tokenizer mode {mode!r} is unknown; allowed are {' and '.join(MODES)}",
            param="tokenizer_mode",
        )

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included; a model may have more rows, which stand for nothing."""
        return self._backend.vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that `skip_special_tokens` leaves out."""
        return self._backend.special_ids

    @property
    def pieces(self) -> PieceTable | None:
        """What each token adds to the text; None where that depends on its neighbours."""
        return self._backend.pieces

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, ascending: the tokenizer's own and the model's."""
        eos = self._files.special_tokens.get("eos_token")
        own = None if eos is None else self._backend.token_id(eos)
        return tuple(sorted({*self._files.eos_token_ids, *(() if own is None else (own,))}))

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works without being given a template."""
        return bool(self._files.chat_templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`.

        Args:
            add_special_tokens: add what the model wants around a text, such as its bos token. A
                rendered chat already holds it.
        Raises: InvalidRequestError if `text` is no string or cannot be written as UTF-8.
        """
        _check_text(text)
        return self._backend.encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids` as a whole; ids outside the vocabulary add nothing."""
        return self._backend.decode(token_ids, skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """What one token reads like amid a text; parts of a character show as U+FFFD."""
        if self.pieces is not None:
            return self.pieces.piece(token_id).decode("utf-8", "replace")
        return self._backend.decode([token_id], False)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a chat. Encode it with `add_special_tokens=False`.

        Args:
            chat_template: Jinja source, or the name of one of the model's templates; by default
                the model's own.
            kwargs: more variables for the template, such as `enable_thinking`.
            The others are those of `render_chat`.
        Raises: InvalidRequestError if there is no template, or `render_chat` refuses.
        """
        from furiosa_llm.text.chat_template import render_chat

        return render_chat(
            self._chat_template(chat_template, has_tools=bool(tools)),
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables={**self._files.special_tokens, **kwargs},
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """The token ids of a chat: `apply_chat_template`, with its keywords, then `encode`."""
        return self.encode(self.apply_chat_template(messages, **kwargs), add_special_tokens=False)

    def _chat_template(self, asked: str | None, *, has_tools: bool) -> str:
        templates = self._files.chat_templates
        if asked is not None:
            return templates.get(asked, asked)
        if has_tools and "tool_use" in templates:
            return templates["tool_use"]
        if "default" in templates:
            return templates["default"]
        if templates:
            raise InvalidRequestError(
                "the model has several chat templates and none is its default: name one of "
                + ", ".join(sorted(templates)),
                param="chat_template",
            )
        raise InvalidRequestError(
            "the model has no chat template: pass chat_template, or prompts instead of messages",
            param="chat_template",
        )


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise InvalidRequestError(f"a text is {type(text).__name__}, not a str", param="prompt")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}; it is no valid Unicode text",
            param="prompt",
        ) from error
