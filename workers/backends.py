"""From the name of a backend to an executor that has its model loaded."""

from __future__ import annotations

from furiosa_llm.errors import ArtifactError
from furiosa_llm.wire.messages import Configure
from furiosa_llm.workers.executor import Executor


def import_backend(backend: str) -> None:
    """Import what `make_executor` will, ahead of it."""
    if backend == "mock":
        import furiosa_llm.workers.kernels.mock
    elif backend == "native":
        import furiosa_llm.workers.kernels.native  # noqa: F401


def make_executor(configure: Configure) -> Executor:
    """The executor that `configure` asks for. Each backend's modules are imported only for it.

    There is no falling back from one backend to another: the tokens of kernel families differ, so
    which one runs is the front-end's decision, for all workers alike.

    Raises: whatever keeps it from running, a FuriosaLLMError when it is foreseen: a damaged
        artifact, a kernel that is not built, a vocabulary other than the front-end's.
    """
    if configure.backend == "mock":
        from furiosa_llm.workers.kernels.mock import MockExecutor

        return MockExecutor(configure.vocab_size, tokens_per_s=configure.mock_tokens_per_s)

    from furiosa_llm.workers.artifact.artifact import Artifact

    artifact = Artifact.open(configure.artifact_path)
    if artifact.config.vocab_size != configure.vocab_size:
        raise ArtifactError(
            f"the artifact {configure.artifact_path} has a vocabulary of "
            f"{artifact.config.vocab_size} tokens but the engine was started for "
            f"{configure.vocab_size}: it was replaced meanwhile; start the engine again"
        )
    if configure.backend == "numpy":
        from furiosa_llm.workers.kernels.reference import ReferenceExecutor

        return ReferenceExecutor(
            artifact,
            num_blocks=configure.num_blocks,
            block_size=configure.block_size,
            kv_cache_dtype=configure.kv_cache_dtype,
        )
    assert configure.backend == "native", "the codec knows three backends"
    from furiosa_llm.workers.kernels.native import NativeExecutor

    return NativeExecutor(
        artifact,
        num_blocks=configure.num_blocks,
        block_size=configure.block_size,
        kv_cache_dtype=configure.kv_cache_dtype,
        cpus=configure.cpus,
        max_num_batched_tokens=configure.max_num_batched_tokens,
    )
