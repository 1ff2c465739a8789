"""One precedence for every option: default < file < environment < flag, each value's origin kept.

The file is TOML or YAML, by its suffix, and holds the options' keys, flat. A key that is no option
is refused, with the nearest one named; so is one that is given twice. A variable whose name only
looks like an option's is not ours to refuse, so it is a warning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from furiosa_llm.checks import refuse, shown
from furiosa_llm.server.options import (
    OPTIONS,
    VARIABLE_PREFIX,
    Option,
    ServeOptions,
    make_options,
)

CONFIG_VARIABLE = "FURIOSA_SERVE_CONFIG"
MAX_FILE_BYTES = 1 << 16

_OTHER_VARIABLES = frozenset(
    VARIABLE_PREFIX + name
    for name in ("CONFIG", "API_KEY", "API_KEYS", "TOPOLOGY", "ISA", "MOCK_TOKENS_PER_S", "PYTHON")
)
"""Variables of that prefix that are no options."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from."""

    kind: str  # default, file, environment or flag
    where: str  # the file, the variable or the flag; "" for a default

    def __str__(self) -> str:
        return f"{self.kind} {self.where}" if self.where else self.kind


_DEFAULT = Origin("default", "")


@dataclass(slots=True)
class Layers:
    """The value and the origin of every option, by key."""

    values: dict[str, Any] = field(
        default_factory=lambda: {key: option.default for key, option in OPTIONS.items()}
    )
    origins: dict[str, Origin] = field(default_factory=lambda: dict.fromkeys(OPTIONS, _DEFAULT))
    warnings: list[str] = field(default_factory=list)

    def options(self) -> ServeOptions:
        """Raises: InvalidRequestError where the values do not go together."""
        return make_options(self.values)

    def put(self, option: Option, name: str, value: Any, origin: Origin) -> None:
        """Lay `value` over what is there. Text is read first; `name` is for the refusal."""
        self.values[option.key] = _checked(option, name, value)
        self.origins[option.key] = origin


def resolve_layers(
    flags: Mapping[str, str],
    *,
    config: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Layers:
    """Put defaults, the file, the environment and the flags on top of each other.

    Args:
        flags: the text of each flag that was given, by key.
        config: the file's path; None looks into FURIOSA_SERVE_CONFIG.
        env: None is this process's environment.
    Raises: InvalidRequestError naming the flag, the variable or the file's key at fault.
    """
    env = os.environ if env is None else env
    layers = Layers()
    config = config or env.get(CONFIG_VARIABLE) or None
    if config is not None:
        for key, value in _read_file(Path(config)).items():
            option = OPTIONS[key]
            layers.put(option, f"{config}: {key}", value, Origin("file", config))
    for option in OPTIONS.values():
        text = env.get(option.variable, "")
        if text:  # an empty variable is an unset one
            origin = Origin("environment", option.variable)
            layers.put(option, option.variable, text, origin)
    for key, text in flags.items():
        option = OPTIONS[key]
        layers.put(option, option.flag, text, Origin("flag", option.flag))
    layers.warnings += _unknown_variables(env)
    return layers


def nearest(word: str, names: Mapping[str, object] | list[str]) -> str:
    """The name that `word` is likely to mean, or ""."""
    import difflib  # for a wrong name only: 15 ms of every start

    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)), "")


def _checked(option: Option, name: str, value: Any) -> Any:
    if isinstance(value, str):
        if option.may_be_none and value.strip().lower() == "none":
            return option.check(name, None)
        value = option.read(name, value)
    return option.check(name, value)


def _read_file(path: Path) -> dict[str, Any]:
    """The file's values by option key, in the file's order.

    Raises: InvalidRequestError if it cannot be read, or holds anything that is no option.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise refuse("--config", f"{shown(str(path))} cannot be read: {error.strerror}") from None
    if len(text) > MAX_FILE_BYTES:
        raise refuse("--config", f"{path} is over {MAX_FILE_BYTES} bytes: it is no such file")
    content = _parse(path, text)
    if not isinstance(content, dict):
        raise refuse("--config", f"{path} holds no list of 'option: value' at its top")
    values: dict[str, Any] = {}
    for name, value in content.items():
        key = str(name).replace("_", "-")
        if key not in OPTIONS:
            raise refuse(f"{path}: {name}", f"there is no such option{_hint(key)}")
        if key in values:
            raise refuse(f"{path}: {key}", "it is there twice, with '-' and with '_': keep one")
        values[key] = value
    return values


def _parse(path: Path, text: bytes) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".toml":
        import tomllib

        try:
            return tomllib.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise refuse("--config", f"{path} is not valid TOML: {error}") from None
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return {} if (content := yaml.load(text, _unique_loader())) is None else content
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise refuse("--config", f"{path} is not valid YAML: {error}") from None
    raise refuse("--config", f"{path} is not a .toml, .yaml or .yml file")


def _unique_loader() -> Any:
    """YAML's safe loader, but a key that is there twice is an error."""
    import yaml

    class UniqueLoader(yaml.SafeLoader):
        pass

    def construct(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice")
            seen.add(key)
        return loader.construct_mapping(node, deep=True)

    UniqueLoader.add_constructor("tag:yaml.org,2002:map", construct)
    return UniqueLoader


def _unknown_variables(env: Mapping[str, str]) -> list[str]:
    known = {option.variable for option in OPTIONS.values()} | _OTHER_VARIABLES
    found = sorted(name for name in env if name.startswith(VARIABLE_PREFIX) and name not in known)
    return [
        f"{name} is set, but is no option's variable"
        + (f": did you mean {near}?" if (near := nearest(name, sorted(known))) else "")
        for name in found
    ]


def _hint(key: str) -> str:
    near = nearest(key, dict(OPTIONS))
    return f": did you mean {near}?" if near else ": 'furiosa-serve help' lists them"
