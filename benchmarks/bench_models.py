"""The models that are measured, as files for both sides, made once in the cache directory.

Both sides start from one GGUF file: llama.cpp's quantize makes its types of it, our builder ours.
"""

from __future__ import annotations

from pathlib import Path

from llamacpp import Peer
from random_model import Shape, write_random_gguf

from furiosa_llm.workers.artifact.known_models import fetch_known_model, find_known_model
from furiosa_llm.workers.artifact.resolve import resolve_model

MODELS = {
    "SmolLM2-135M": "SmolLM2-135M-Instruct",
    "1B-shaped": "random weights, Llama-3.2-1B's shape",
}
PEER_TYPES = {"int4": "Q4_0", "int8": "Q8_0", "bf16": "F16", "fp32": "F32"}


def base_gguf(model: str, cache_dir: Path, peer: Peer | None) -> Path:
    """The file that every type is made from, as wide as the model's own values.

    SmolLM2 comes as Q4_1, whose blocks our int4 would take over as they are, with a minimum that
    Q4_0 has not: its values as float32 make both sides quantise for themselves.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    if model == "1B-shaped":
        path = cache_dir / f"{model}-base-F16.gguf"
        if not path.exists():
            print(f"writing {path} …", flush=True)
            write_random_gguf(path, Shape())
        return path
    path = cache_dir / f"{model}-F32.gguf"
    if not path.exists():
        known = find_known_model(MODELS[model])
        assert known is not None
        assert peer is not None, "only the peer's tool widens a GGUF file"
        peer.quantize(fetch_known_model(known, cache_dir), path, "F32")
    return path


def peer_gguf(model: str, weights: str, cache_dir: Path, peer: Peer) -> Path:
    """llama.cpp's file of the matching type."""
    path = cache_dir / f"{model}-{PEER_TYPES[weights]}.gguf"
    if not path.exists():
        print(f"writing {path} …", flush=True)
        peer.quantize(base_gguf(model, cache_dir, peer), path, PEER_TYPES[weights])
    return path


def our_artifact(model: str, weights: str, cache_dir: Path, peer: Peer | None) -> Path:
    """Our artifact of the type."""
    path = base_gguf(model, cache_dir, peer)
    return resolve_model(str(path), cache_dir=cache_dir, weights=weights).path
