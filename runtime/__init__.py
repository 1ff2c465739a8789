"""furiosa_llm: serve large language models, one worker process per data-parallel group.

Every name is loaded on first use. Importing any sub-package runs this file, so it must stay free
of imports: a worker's `import furiosa_llm.workers` loads neither a tokenizer nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME_OF = {
    "AsyncEngineArgs": "furiosa_llm.args",
    "EngineArgs": "furiosa_llm.args",
    "AsyncLLMEngine": "furiosa_llm.engine.async_llm_engine",
    "LLMEngine": "furiosa_llm.engine.llm_engine",
    "LLM": "furiosa_llm.engine.llm",
    "SamplingParams": "furiosa_llm.sampling_params",
    "RequestOutputKind": "furiosa_llm.sampling_params",
    "CompletionOutput": "furiosa_llm.outputs",
    "Logprob": "furiosa_llm.outputs",
    "RequestOutput": "furiosa_llm.outputs",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EngineArgs",
    "LLMEngine",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'furiosa_llm' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from furiosa_llm.args import AsyncEngineArgs, EngineArgs
    from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
    from furiosa_llm.engine.llm import LLM
    from furiosa_llm.engine.llm_engine import LLMEngine
    from furiosa_llm.outputs import CompletionOutput, Logprob, RequestOutput
    from furiosa_llm.sampling_params import RequestOutputKind, SamplingParams
