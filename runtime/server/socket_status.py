"""The service's state in plain values, for clients of the socket."""

from __future__ import annotations

from typing import Any

import msgspec

from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.server.service import Service
from furiosa_llm.server.status import ServerStatus


def plain_status(server_status: ServerStatus, service: Service) -> dict[str, Any]:
    """What HTTP's status says, and what only clients of the socket need."""
    # By way of JSON: `to_builtins` leaves tuples, and the wire knows lists.
    status: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(server_status))
    engine = service.engine_or_none
    status["model_id"] = None if engine is None else model_id(service.artifact_id, engine)
    status["has_chat_template"] = engine is not None and (
        service.chat_template is not None or engine.tokenizer.has_chat_template
    )
    return status


def model_id(artifact_id: str, engine: AsyncLLMEngine) -> str:
    """What decides the tokens of a request besides the request: a stream goes on where it is equal.

    The promise of equal tokens is per artifact, kernel family and type of the KV cache.
    """
    kv_cache_dtype = engine.settings.workers[0].kv_cache_dtype
    return f"{artifact_id}/{engine.weights}/{engine.isa}/kv-{kv_cache_dtype}"
