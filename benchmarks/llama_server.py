"""The peer's server, at its best settings for a number of clients."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from llamacpp import find_or_build
from servers import Command, free_port

TOOL = "llama-server"


def find_or_build_server(cache_dir: Path, bin_dir: Path | None) -> Path:
    """The program: in `bin_dir`, or in the cache, where it is built if need be."""
    if bin_dir is not None and not (bin_dir / TOOL).exists():
        raise SystemExit(f"{bin_dir} lacks {TOOL}: build llama.cpp's server there")
    directory = bin_dir or find_or_build(cache_dir).bin_dir
    if not (directory / TOOL).exists():
        build = directory.parent
        jobs = str(len(os.sched_getaffinity(0)))
        subprocess.run(["cmake", "-DLLAMA_BUILD_SERVER=ON", build], check=True)
        subprocess.run(["cmake", "--build", build, "-j", jobs, "--target", TOOL], check=True)
    return directory / TOOL


def llama_server(
    tool: Path,
    gguf: Path,
    *,
    num_threads: int,
    num_slots: int,
    num_tokens: int,
    flash_attention: bool | None = None,
    is_prompt_cache_on: bool = False,
    cpus: frozenset[int] | None = None,
) -> Command:
    """The command, with a slot for each client and room for `num_tokens` in each.

    Each slot has a KV buffer of its own: in one shared buffer a step would attend to every other
    slot's tokens, only to mask them. The cache of prompts in memory is off: prompts here are never
    alike, and it copies a slot's whole state at each request (with it, one-token requests come at
    a third of the rate).

    Args:
        flash_attention: None leaves it to the server.
    """
    port = free_port()
    cells = num_slots * (-(-(num_tokens + 16) // 256) * 256)
    arguments = [
        *(str(tool), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port)),
        *("-t", str(num_threads), "-np", str(num_slots), "-c", str(cells), "-no-kvu"),
        *("-b", "2048", "-ub", "512", "--log-disable", "--no-ui"),
    ]
    if not is_prompt_cache_on:
        arguments += ["--cache-ram", "0"]
    if flash_attention is not None:
        arguments += ["-fa", "on" if flash_attention else "off"]
    return Command("llama-server", arguments, port, gguf.name, cpus=cpus)
