"""Every option of `furiosa-serve serve`, in one table.

A row of `OPTIONS` says once how the option is read and checked, where its value goes, and what the
help says. From it follow the flag `--max-queue`, the environment variable FURIOSA_SERVE_MAX_QUEUE
and the key `max-queue` of a configuration file (`option_layers.py` puts these together), the
command line's help, `config show` and the shell's completion.

The values end in the small frozen parts that the server is made of; their defaults are the options'
defaults.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furiosa_llm.args import ENGINE_FIELDS, AsyncEngineArgs
from furiosa_llm.checks import check_choice, check_int, check_number, refuse, shown
from furiosa_llm.run_dir import DEFAULT_NAME, check_name
from furiosa_llm.server.http_config import HttpConfig
from furiosa_llm.server.limits import Limits
from furiosa_llm.server.option_readers import (
    Read,
    read_bool,
    read_bytes,
    read_count,
    read_list,
    read_seconds,
    read_text,
)

VARIABLE_PREFIX = "FURIOSA_SERVE_"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
GROUPS = ("Daemon", "HTTP", "Model", "Limits", "Logging", "Engine", "Engine, tuning")
MAX_API_SERVERS = 64
MAX_DRAIN_S = 86_400.0

Check = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """What the daemon itself needs to know."""

    name: str = DEFAULT_NAME
    """Of the runtime directory: what `stop`, `status` and clients name."""
    socket: str = "auto"
    """The client libraries' endpoint: auto (in the runtime directory), none, ipc://… or tcp://…"""
    curve_key_file: str | None = None
    """The socket's own pair of keys, for tcp://."""
    curve_clients_dir: str | None = None
    """The public keys of those who may connect."""
    drain_timeout_s: float = 30.0
    """How long requests may still run once the daemon was asked to stop."""
    api_servers: int = 1
    """Front-end processes that share the workers."""
    api_key_file: str | None = None
    """One key a line; read again on reload."""
    served_model_name: tuple[str, ...] = ()
    """What requests may call the model; empty: the model's own name."""
    chat_template: str | None = None
    """A file, in place of the model's own."""
    log_level: str = "info"
    log_format: str = "text"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """All options, each in the part that it belongs to."""

    daemon: DaemonConfig
    http: HttpConfig
    limits: Limits
    engine: AsyncEngineArgs


@dataclass(frozen=True, slots=True)
class Option:
    """A row of the table."""

    owner: str  # the field of ServeOptions that holds it
    field: str  # of that part
    group: str  # of the help
    read: Read
    metavar: str
    check: Check
    help: str
    default: Any
    may_be_none: bool
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name in a file and, behind two dashes, on the command line. Units are left out, for
        the value may carry one.
        """
        name = self.field
        if self.owner != "engine":
            name = name.removesuffix("_s").removesuffix("_bytes")
        return name.replace("_", "-")

    @property
    def flag(self) -> str:
        return f"--{self.key}"

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return VARIABLE_PREFIX + self.key.replace("-", "_").upper()


# Checks: (what the user typed the name of, value) to the value in its normal form.


def _optional(check: Check) -> Check:
    return lambda flag, value: None if value is None else check(flag, value)


def _int(low: int, high: int) -> Check:
    return lambda flag, value: check_int(flag, value, low=low, high=high)


def _seconds(low: float, high: float) -> Check:
    return lambda flag, value: check_number(flag, value, low=low, high=high)


def _one_of(*choices: str) -> Check:
    return lambda flag, value: check_choice(flag, value, choices)


def _text(what: str) -> Check:
    def check(flag: str, value: Any) -> str:
        if isinstance(value, str) and value.strip():
            return value
        raise refuse(flag, f"{shown(value)} is not {what}")

    return check


def _path(flag: str, value: Any) -> str:
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return str(Path(os.fsdecode(value)).expanduser())
    raise refuse(flag, f"{shown(value)} is not a file's path")


def _texts(what: str) -> Check:
    each = _text(what)

    def check(flag: str, value: Any) -> tuple[str, ...]:
        values = (value,) if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise refuse(flag, f"{shown(value)} is not a list of words")
        return tuple(each(flag, one) for one in values)

    return check


def _socket(flag: str, value: Any) -> str:
    if isinstance(value, str):
        if value.lower() in ("auto", "none"):
            return value.lower()
        scheme, separator, rest = value.partition("://")
        if separator and scheme in ("ipc", "tcp") and rest:
            return value
    raise refuse(flag, f"{shown(value)} is not auto, none, ipc://PATH or tcp://HOST:PORT")


_DAEMON: dict[str, tuple[str, Read, str, Check, str]] = {
    "name": (
        "Daemon", read_text, "NAME", check_name,
        "what 'furiosa-serve stop', 'status' and clients call this daemon",
    ),
    "socket": (
        "Daemon", read_text, "ENDPOINT", _socket,
        "for client libraries: auto (in the runtime directory), none, ipc://PATH, tcp://HOST:PORT",
    ),
    "curve_key_file": (
        "Daemon", read_text, "FILE", _optional(_path),
        "the socket's .key_secret file, for tcp:// ('furiosa-serve keys' makes it)",
    ),
    "curve_clients_dir": (
        "Daemon", read_text, "DIR", _optional(_path),
        "the .key files of the clients that may connect to a tcp:// socket",
    ),
    "drain_timeout_s": (
        "Daemon", read_seconds, "TIME", _seconds(0, MAX_DRAIN_S),
        "how long running requests may go on once the daemon is asked to stop",
    ),
    "api_servers": (
        "Daemon", read_count, "N", _int(1, MAX_API_SERVERS),
        "front-end processes that share the port and the workers; limits hold for each",
    ),
    "api_key_file": (
        "HTTP", read_text, "FILE", _optional(_path),
        "a file of keys, one a line, of which callers must send one; read again on reload",
    ),
    "served_model_name": (
        "Model", read_list, "NAME[,NAME]", _texts("a model's name"),
        "what requests call the model (default: its own name)",
    ),
    "chat_template": (
        "Model", read_text, "FILE", _optional(_path), "a Jinja file in place of the model's own",
    ),
    "log_level": (
        "Logging", read_text, "LEVEL", _one_of(*LOG_LEVELS), ", ".join(LOG_LEVELS),
    ),
    "log_format": (
        "Logging", read_text, "FORMAT", _one_of(*LOG_FORMATS),
        "text, or json for one object a line",
    ),
}  # fmt: skip
_HTTP: dict[str, tuple[str, Read, str, Check, str]] = {
    "host": ("HTTP", read_text, "HOST", _text("a host name or address"), "address to listen on"),
    "port": ("HTTP", read_count, "PORT", _int(0, 65_535), "port to listen on; 0 takes a free one"),
    "uds": (
        "HTTP", read_text, "PATH", _optional(_path),
        "listen on this Unix socket instead of host and port",
    ),
    "ssl_certfile": (
        "HTTP", read_text, "FILE", _optional(_path),
        "certificate chain in PEM: HTTPS instead of HTTP; read again on reload",
    ),
    "ssl_keyfile": (
        "HTTP", read_text, "FILE", _optional(_path),
        "its private key (default: in the certificate's file)",
    ),
    "cors_origins": (
        "HTTP", read_list, "ORIGIN[,ORIGIN]", _texts("an origin"),
        "origins whose web pages may call; * is any (default: none)",
    ),
    "header_timeout_s": (
        "Limits", read_seconds, "TIME", _seconds(0.1, 3600), "to receive a request's headers"
    ),
    "body_timeout_s": (
        "Limits", read_seconds, "TIME", _seconds(0.1, 3600), "to receive a request's body"
    ),
    "idle_timeout_s": (
        "Limits", read_seconds, "TIME", _seconds(0.1, 86_400), "of a connection between requests"
    ),
    "write_timeout_s": (
        "Limits", read_seconds, "TIME", _seconds(0.1, 86_400),
        "a reader that takes nothing of what it is sent for so long is cut off",
    ),
    "max_header_bytes": (
        "Limits", read_bytes, "BYTES", _int(1024, 16 << 20), "of a request's headers"
    ),
    "max_connections": (
        "Limits", read_count, "N", _int(1, 1_000_000), "open at once; one more is refused (503)"
    ),
    "keep_alive_interval_s": (
        "HTTP", read_seconds, "TIME", _seconds(0.1, 3600),
        "a stream that has been silent for so long gets a comment",
    ),
}  # fmt: skip
_LIMITS: dict[str, tuple[str, Read, str, Check, str]] = {
    "max_body_bytes": (
        "Limits", read_bytes, "BYTES", _int(1024, 2**31 - 1), "of a request's body (413)"
    ),
    "max_queue": (
        "Limits", read_count, "N", _int(0, 1_000_000),
        "requests waiting beyond those that run; one more is refused (429)",
    ),
    "max_prompts": (
        "Limits", read_count, "N", _int(1, 1_000_000), "prompts of one completion request"
    ),
    "max_choices": ("Limits", read_count, "N", _int(1, 1_000_000), "prompts times n of a request"),
    "max_messages": ("Limits", read_count, "N", _int(1, 1_000_000), "messages of one chat"),
}  # fmt: skip
_CHOICES = {"log_level": LOG_LEVELS, "log_format": LOG_FORMATS}
_SHOWN_AS_BYTES = ("max_header_bytes", "max_body_bytes")


def _rows(
    owner: str, part: Any, table: Mapping[str, tuple[str, Read, str, Check, str]]
) -> list[Option]:
    rows = []
    for field, (group, read, metavar, check, text) in table.items():
        default = getattr(part, field)
        if default is not None and default != () and "(default" not in text:
            text += f" (default: {_default_text(field, default)})"
        rows.append(
            Option(
                owner, field, group, read, metavar, check, text, default, default is None,
                _CHOICES.get(field, ()),
            )
        )  # fmt: skip
    return rows


def _default_text(field: str, default: object) -> str:
    if field in _SHOWN_AS_BYTES and isinstance(default, int) and default % 1024 == 0:
        return f"{default >> 20}MiB" if default % (1 << 20) == 0 else f"{default >> 10}KiB"
    return f"{default:g}s" if isinstance(default, float) else str(default)


_MODEL_FIELDS = ("model", "tokenizer", "tokenizer_mode", "weights", "cache_dir")
_MAIN_ENGINE_FIELDS = (
    "devices", "data_parallel_size", "tensor_parallel_size", "backend", "max_model_len", "seed",
)  # fmt: skip


def _engine_rows() -> list[Option]:
    """The engine's arguments under their own names; counts may be written as 8k."""
    defaults = {each.name: each for each in dataclasses.fields(AsyncEngineArgs)}
    rows = []
    for field, row in ENGINE_FIELDS.items():
        default = None
        if field != "model":
            made = defaults[field].default_factory
            default = defaults[field].default if made is dataclasses.MISSING else made()
        group = "Model" if field in _MODEL_FIELDS else "Engine"
        if group == "Engine" and field not in _MAIN_ENGINE_FIELDS:
            group = "Engine, tuning"
        read = {"N": read_count, "BOOL": read_bool}.get(row.metavar, row.read)
        if field == "seed":
            read = row.read  # it may be negative
        may_be_none = field == "cache_dir" or (field != "model" and default is None)
        rows.append(
            Option(
                "engine", field, group, read, row.metavar, row.check, row.help, default, may_be_none
            )
        )
    return rows


def _table() -> dict[str, Option]:
    rows = [
        *_rows("daemon", DaemonConfig(), _DAEMON),
        *_rows("http", HttpConfig(), _HTTP),
        *_rows("limits", Limits(), _LIMITS),
        *_engine_rows(),
    ]
    table = {row.key: row for row in rows}
    assert len(table) == len(rows), "two options of one name"
    assert {row.group for row in rows} <= set(GROUPS)
    return table


OPTIONS: Mapping[str, Option] = _table()
"""By key, in the order of the help within each group."""


def is_switch(option: Option) -> bool:
    """Whether the flag alone, without a value, says true."""
    return option.read is read_bool


def make_options(values: Mapping[str, Any]) -> ServeOptions:
    """The options of checked values by key; those that are not given have their defaults.

    Raises: InvalidRequestError where values that are right by themselves do not go together.
    """
    parts: dict[str, dict[str, Any]] = {"daemon": {}, "http": {}, "limits": {}, "engine": {}}
    for key, value in values.items():
        option = OPTIONS[key]
        parts[option.owner][option.field] = value
    http, daemon = HttpConfig(**parts["http"]), DaemonConfig(**parts["daemon"])
    if http.ssl_keyfile is not None and http.ssl_certfile is None:
        raise refuse("--ssl-keyfile", "there is a key but no --ssl-certfile: give both")
    if parts["engine"].get("model") is None:
        raise refuse(
            "MODEL", "there is none: give an artifact, a checkpoint directory, a .gguf file, or "
            "SmolLM2-135M-Instruct, which is fetched",
        )  # fmt: skip
    has_keys = daemon.curve_key_file is not None and daemon.curve_clients_dir is not None
    if daemon.socket.startswith("tcp://") and not has_keys:
        raise refuse(
            "--socket", f"{daemon.socket} is open to whoever reaches this machine: give "
            f"--curve-key-file and --curve-clients-dir, or use ipc://",
        )  # fmt: skip
    if daemon.api_servers > 1 and http.uds is not None:
        raise refuse(
            "--api-servers", f"{daemon.api_servers} processes cannot share the Unix socket "
            f"{http.uds}, only a port: leave out --uds, or use 1",
        )  # fmt: skip
    return ServeOptions(
        daemon=daemon,
        http=dataclasses.replace(http, reuse_port=daemon.api_servers > 1),
        limits=Limits(**parts["limits"]),
        engine=AsyncEngineArgs(**parts["engine"]),
    )
