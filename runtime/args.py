"""The engine's arguments: fields for programs, flags for the command line.

Each field has one row in `ENGINE_FIELDS`: how its flag's text is read, and the check that the
constructor and the flag share. The order of the rows is that of the flags; the order of the
dataclass's fields is that of Furiosa-LLM, whose arguments may be given by position.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Self

from furiosa_llm.checks import check_bool, check_choice, check_int, check_number, refuse, shown
from furiosa_llm.devices import parse_devices
from furiosa_llm.errors import DeviceError, InvalidRequestError

BACKENDS = ("native", "numpy", "mock")
WEIGHTS = ("auto", "fp32", "bf16", "int8", "int4")
KV_CACHE_DTYPES = ("auto", "fp32", "bf16", "int8")
PACKING_TYPES = ("IDENTITY", "GREEDY")
TOKENIZER_MODES = ("auto", "slow")
MAX_NUM_SEQS = 8192  # the most rows of one message to a worker
MAX_BLOCK_SIZE = 1024  # tokens
MAX_KV_CACHE_MEMORY = 2**50  # bytes

_BACKEND_ALIASES = {
    "mock_backend_v2": "mock",
    "furiosa_rt_npu": "native",
    "furiosa_rt_v2": "native",
}
"""Furiosa-LLM's names for what here are other backends."""

_MEMORY = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,9})?)\s*(?:([kmgt]?)(i?)b)?", re.IGNORECASE)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/furiosa/llm`, or `~/.cache/furiosa/llm` when that is unset or relative."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification has such a value ignored
        base = Path.home() / ".cache"
    return base / "furiosa" / "llm"


@dataclass
class EngineArgs:
    """How an engine is built. Values are checked and put into their normal form when it is made.

    Raises: InvalidRequestError (a ValueError), naming the flag, the value and what is allowed.
    """

    model: str
    """An artifact, a checkpoint directory, a .gguf file, or a known model's id."""
    num_speculative_tokens: int | None = None
    """Only None: this version has no draft models."""
    use_speculative_decoding_if_possible: bool = True
    """Accepted either way; without draft models it is never possible."""
    data_parallel_size: int | None = None
    """Workers; None is one per device."""
    tokenizer: str | None = None
    """Directory of another tokenizer than the model's own."""
    tokenizer_mode: str = "auto"
    """auto or slow, in any case; stored in lower case."""
    seed: int | None = None
    """Makes requests without a seed of their own repeatable."""
    devices: str | list[str] | None = None
    """As `devices.parse_devices` reads it; None is every card."""
    cache_dir: Path | str | None = field(default_factory=default_cache_dir)
    """Where models that were built or fetched are kept; None keeps nothing."""
    backend: str | None = None
    """native, numpy or mock; None is native where it was built. Furiosa-LLM's names are mapped."""
    paged_attention_num_blocks: int | None = None
    """KV blocks of each worker; None is as many as `kv_cache_memory` or the machine holds."""
    npu_queue_limit: int | None = None
    """Steps queued on a worker's PEs at once."""
    max_processing_samples: int | None = None
    """Sequences that each worker may hold; more wait in the front-end."""
    spare_blocks_ratio: float | None = None
    """Share of the KV blocks kept free when a sequence is let in; from 0 to below 1."""
    is_offline: bool | None = None
    """Favour throughput over latency."""
    speculative_model_paged_attention_num_blocks: int | None = None
    """Only None, as `num_speculative_tokens`."""
    packing_type: str = "IDENTITY"
    """How prompts share a step: IDENTITY or GREEDY."""

    _: KW_ONLY
    weights: str = "auto"
    """The matrices' type where the model is built: auto (its own), fp32, bf16, int8 or int4."""
    kv_cache_dtype: str = "auto"
    """auto, fp32 or bf16."""
    block_size: int = 16
    """Tokens of a KV block."""
    kv_cache_memory: int | None = None
    """Bytes of each worker's KV pool; a string such as "512MiB" or "2GB" is accepted."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together, at most; it can only lower the model's own limit."""
    max_num_seqs: int | None = None
    """Sequences in one step, at most."""
    max_num_batched_tokens: int | None = None
    """Tokens in one step, at most."""
    tensor_parallel_size: int | None = None
    """PEs of each worker; None is all of its device's."""

    def __post_init__(self) -> None:
        for name, row in ENGINE_FIELDS.items():
            setattr(self, name, row.check(_flag(name), getattr(self, name)))
        if self.paged_attention_num_blocks is not None and self.kv_cache_memory is not None:
            raise refuse(
                "--kv-cache-memory",
                f"{self.kv_cache_memory} bytes and --paged-attention-num-blocks "
                f"{self.paged_attention_num_blocks} both size the KV pool: give one of them",
            )

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the flags to `parser`, which is returned. A bad value is argparse's own error."""
        ours = parser.add_argument_group("furiosa-serve")
        for name, row in ENGINE_FIELDS.items():
            (ours if row.is_ours else parser).add_argument(_flag(name), **_argument(name, row))
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """The arguments that a parsed command line holds.

        Attributes that are not fields are ignored; a field that is not there has its default.

        Raises: InvalidRequestError, for what a parser other than `add_cli_args`'s let through.
        """
        names = [each.name for each in dataclasses.fields(cls)]
        given = {name: getattr(args, name) for name in names if hasattr(args, name)}
        return cls(**{"model": None, **given})


@dataclass
class AsyncEngineArgs(EngineArgs):
    """`EngineArgs` of an `AsyncLLMEngine`; there is no further field."""


# Checks: (flag, value) to the value in its normal form. They raise InvalidRequestError.

Check = Callable[[str, Any], Any]


def _optional(check: Check) -> Check:
    return lambda flag, value: None if value is None else check(flag, value)


def _int(low: int, high: int | None = None) -> Check:
    bounds = {"low": low} if high is None else {"low": low, "high": high}
    return lambda flag, value: check_int(flag, value, **bounds)


def _one_of(*choices: str) -> Check:
    return lambda flag, value: check_choice(flag, value, choices)


def _check_model(flag: str, value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and value.strip():
        return value
    raise refuse(
        flag,
        f"{shown(value)} is not a path (of an artifact, a checkpoint directory or a .gguf file) or "
        f"a model's id",
    )


def _check_tokenizer(flag: str, value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and value.strip():
        return value
    raise refuse(flag, f"{shown(value)} is not the path of a tokenizer's directory")


def _check_cache_dir(flag: str, value: Any) -> Path:
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return Path(os.fsdecode(value)).expanduser()
    raise refuse(flag, f"{shown(value)} is not a directory's path, or None to keep nothing")


def _check_devices(flag: str, value: Any) -> str | list[str]:
    try:
        parse_devices(value)
    except DeviceError as error:
        raise DeviceError(f"{flag}: {error}", param="devices") from None
    return value if isinstance(value, str) else list(value)


def _check_backend(flag: str, value: Any) -> str:
    name = getattr(value, "value", value)  # Furiosa-LLM's LLMBackend is an enum
    if isinstance(name, str):
        name = _BACKEND_ALIASES.get(name.lower(), name)
    return check_choice(flag, name, BACKENDS)


def _check_kv_cache_dtype(flag: str, value: Any) -> str:
    return check_choice(flag, value, KV_CACHE_DTYPES)


def _check_spare_blocks_ratio(flag: str, value: Any) -> float:
    return check_number(flag, value, low=0, high=1, below=True)


def _check_kv_cache_memory(flag: str, value: Any) -> int:
    if isinstance(value, str):
        match = _MEMORY.fullmatch(value.strip())
        if match is None:
            raise refuse(
                flag, f"{shown(value)} is not a number of bytes such as 536870912, 512MiB or 2GB"
            )
        number, prefix, binary = match.groups(default="")
        unit = (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " ")
        value = int(float(number) * unit) if "." in number else int(number) * unit
    return check_int(flag, value, low=1, high=MAX_KV_CACHE_MEMORY)


def _refuse_draft(flag: str, value: Any) -> None:
    raise refuse(
        flag, f"{shown(value)} needs a draft model, not supported in this version: leave it out"
    )


# Readers: (flag, a flag's text) to a value for the check. They raise InvalidRequestError.

Read = Callable[[str, str], Any]


def _read_text(flag: str, text: str) -> str:
    return text


def _read_int(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise refuse(flag, f"{shown(text)} is not an integer") from None


def _read_float(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise refuse(flag, f"{shown(text)} is not a number") from None


def _read_bool(flag: str, text: str) -> bool:
    word = text.strip().lower()
    if word in ("true", "yes", "1"):
        return True
    if word in ("false", "no", "0"):
        return False
    raise refuse(flag, f"{shown(text)} is not True or False (or yes, no, 1, 0)")


@dataclass(frozen=True, slots=True)
class _Field:
    read: Read
    metavar: str
    check: Check
    help: str
    is_ours: bool = False  # not one of Furiosa-LLM's


_COUNT = _optional(_int(1))
ENGINE_FIELDS = {
    "model": _Field(
        _read_text, "MODEL", _check_model,
        "artifact, checkpoint directory, .gguf file, or a known model's id (required)",
    ),
    "num_speculative_tokens": _Field(
        _read_int, "N", _optional(_refuse_draft), "not supported in this version"
    ),
    "tokenizer": _Field(
        _read_text, "DIR", _optional(_check_tokenizer),
        "directory of the tokenizer (default: the model's own)",
    ),
    "tokenizer_mode": _Field(
        _read_text, "MODE", _one_of(*TOKENIZER_MODES), "auto or slow (default: auto)"
    ),
    "seed": _Field(
        _read_int, "N", _optional(_int(-(2**63), 2**64 - 1)),
        "makes requests without a seed of their own repeatable",
    ),
    "devices": _Field(
        _read_text, "LIST", _optional(_check_devices),
        "such as npu:0,npu:1:0-3 or cpu (default: every card)",
    ),
    "data_parallel_size": _Field(
        _read_int, "N", _COUNT, "how many workers (default: one per device)"
    ),
    "cache_dir": _Field(
        _read_text, "DIR", _optional(_check_cache_dir),
        "where models that were built or fetched are kept; None keeps nothing "
        "(default: ${XDG_CACHE_HOME:-~/.cache}/furiosa/llm)",
    ),
    "backend": _Field(
        _read_text, "NAME", _optional(_check_backend),
        f"{', '.join(BACKENDS)} (default: native where it was built, else numpy)",
    ),
    "paged_attention_num_blocks": _Field(
        _read_int, "N", _COUNT, "KV blocks of each worker (default: what its load or memory allows)"
    ),
    "npu_queue_limit": _Field(
        _read_int, "N", _COUNT, "steps queued on a worker's PEs at once (default: 2)"
    ),
    "max_processing_samples": _Field(
        _read_int, "N", _COUNT, "sequences in work at once (default: 65536)"
    ),
    "spare_blocks_ratio": _Field(
        _read_float, "RATIO", _optional(_check_spare_blocks_ratio),
        "share of the KV blocks kept free, from 0 to below 1 (default: 0.2; offline: 0)",
    ),
    "is_offline": _Field(
        _read_bool, "BOOL", _optional(check_bool), "favour throughput over latency (default: False)"
    ),
    "use_speculative_decoding_if_possible": _Field(
        _read_bool, "BOOL", check_bool, "without effect in this version (default: True)"
    ),
    "speculative_model_paged_attention_num_blocks": _Field(
        _read_int, "N", _optional(_refuse_draft), "not supported in this version"
    ),
    "packing_type": _Field(
        _read_text, "TYPE", _one_of(*PACKING_TYPES),
        "how prompts share a step: IDENTITY or GREEDY (default: IDENTITY)",
    ),
    "weights": _Field(
        _read_text, "TYPE", _one_of(*WEIGHTS),
        f"the matrices' type where the model is built: {', '.join(WEIGHTS)} (default: auto)",
        is_ours=True,
    ),
    "kv_cache_dtype": _Field(
        _read_text, "TYPE", _check_kv_cache_dtype,
        f"{', '.join(KV_CACHE_DTYPES)} (default: auto)",
        is_ours=True,
    ),
    "block_size": _Field(
        _read_int, "N", _int(1, MAX_BLOCK_SIZE), "tokens of a KV block (default: 16)", is_ours=True
    ),
    "kv_cache_memory": _Field(
        _read_text, "BYTES", _optional(_check_kv_cache_memory),
        "each worker's KV pool, such as 512MiB or 2GB",
        is_ours=True,
    ),
    "max_model_len": _Field(
        _read_int, "N", _optional(_int(2)),
        "tokens of prompt and answer together (default: the model's own limit)",
        is_ours=True,
    ),
    "max_num_seqs": _Field(
        _read_int, "N", _optional(_int(1, MAX_NUM_SEQS)), "sequences in one step (default: 256)",
        is_ours=True,
    ),
    "max_num_batched_tokens": _Field(
        _read_int, "N", _COUNT, "tokens in one step (default: 2048; offline: 8192)", is_ours=True
    ),
    "tensor_parallel_size": _Field(
        _read_int, "N", _COUNT, "PEs of each worker (default: all of its device)", is_ours=True
    ),
}  # fmt: skip
"""In the order of the flags."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _argument(name: str, row: _Field) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for this field."""
    argument: dict[str, Any] = {
        "type": _argparse_type(name, row), "metavar": row.metavar, "help": row.help
    }  # fmt: skip
    if name == "model":
        return {**argument, "required": True}
    if row.read is _read_bool:
        argument |= {"nargs": "?", "const": True}
    if name == "cache_dir":  # a Path, not None: argparse would read a default that is a string
        return {**argument, "default": default_cache_dir()}
    return {**argument, "default": _DEFAULT_OF[name]}


def _argparse_type(name: str, row: _Field) -> Callable[[str], Any]:
    """Text to checked value, such that argparse shows our message and exits with 2."""
    flag = _flag(name)
    is_optional = name == "cache_dir" or _DEFAULT_OF.get(name, "") is None

    def read(text: str) -> Any:
        if is_optional and text == "None":
            return None
        try:
            return row.check(flag, row.read(flag, text))
        except InvalidRequestError as error:
            # argparse puts "argument FLAG: " before the message.
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{flag}: ")) from None

    return read


_DEFAULT_OF = {each.name: each.default for each in dataclasses.fields(EngineArgs)}
