"""The sampling flags of the command line, and the SamplingParams that they make."""

from __future__ import annotations

import argparse
from typing import Any

from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams

# flag -> (type, help). Where a flag is not given, SamplingParams' own default holds.
_FLAGS: dict[str, tuple[type, str]] = {
    "--top-p": (float, "sample from the smallest set of likeliest tokens of this probability"),
    "--top-k": (int, "sample from the K likeliest tokens"),
    "--min-p": (float, "drop tokens less likely than this share of the likeliest's probability"),
    "--repetition-penalty": (float, "over 1: make tokens that occurred before less likely"),
    "--min-tokens": (int, "do not end an answer before this many tokens"),
}


def add_sampling_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`, in a group of their own."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="tokens per answer (default: 256)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token each time; 1 samples as the model says (default: 0)",
    )
    for flag, (kind, text) in _FLAGS.items():
        group.add_argument(flag, type=kind, metavar="N" if kind is int else "P", help=text)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end an answer before this text; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on until --max-tokens")
    group.add_argument(
        "--sampling-seed",
        type=int,
        metavar="N",
        help="the requests' seed: same seed, same answers; --seed is the engine's",
    )


def sampling_params(namespace: argparse.Namespace) -> SamplingParams:
    """What the flags say, for streaming.

    Raises: InvalidRequestError naming the value that is out of range.
    """
    given: dict[str, Any] = {
        "max_tokens": namespace.max_tokens,
        "temperature": namespace.temperature,
        "ignore_eos": namespace.ignore_eos,
        "stop": namespace.stop,
        "seed": namespace.sampling_seed,
        "output_kind": RequestOutputKind.DELTA,
    }
    for flag in _FLAGS:
        name = flag.lstrip("-").replace("-", "_")
        given[name] = getattr(namespace, name)
    return SamplingParams.from_optional(**given)
