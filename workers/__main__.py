"""`python -m furiosa_llm.workers`: the process of one data-parallel group.

Started by the front-end, never by hand: its configuration comes over standard input, which then
stays open as the tether (tether.py). The front-end may start it before it knows that configuration:
the imports that `--backend=NAME` needs are made meanwhile. The other command-line arguments only
tell a reader of `ps` which worker this is. Standard output and error belong to the front-end's log.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import zmq

from furiosa_llm.errors import FuriosaLLMError, to_wire
from furiosa_llm.wire.codec import clip_text
from furiosa_llm.wire.errors import WireError
from furiosa_llm.wire.messages import Configure, StartFailed
from furiosa_llm.wire.pipe import read_configure
from furiosa_llm.wire.sockets import connect_dealer
from furiosa_llm.workers.link import FrontEndLink
from furiosa_llm.workers.pinning import bind_process
from furiosa_llm.workers.tether import hold_tether

if TYPE_CHECKING:
    from furiosa_llm.workers.loop import WorkerLoop

EXIT_NOT_CONFIGURED = 64
EXIT_START_FAILED = 69
EXIT_STEP_FAILED = 70

START_FAILED_LINGER_MS = 5000
"""How long a worker that cannot start waits for its reason to be sent."""

GC_THRESHOLDS = (10_000, 20, 50)
"""Instead of (700, 10, 10). Nearly all that a worker makes goes by its reference count."""

_log = logging.getLogger("furiosa_llm.workers")


def main() -> int:
    """Run the worker; the exit code says how it ended."""
    # Ctrl-C goes to every process of the terminal, but what it means is for the front-end to say.
    # SIGTERM keeps its default, which works even in the middle of a step: nothing needs tidying.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if sys.stdin.isatty():
        print("a worker is started by the engine: see furiosa-serve --help", file=sys.stderr)
        return EXIT_NOT_CONFIGURED
    gc.set_threshold(*GC_THRESHOLDS)
    _load_ahead(sys.argv[1:])
    try:
        with open(0, "rb", buffering=0, closefd=False) as pipe:
            configure = read_configure(pipe)
    except (EOFError, WireError) as error:
        _log.error("no configuration on standard input: %s", error)
        return EXIT_NOT_CONFIGURED
    bind_process(configure.cpus)  # before there are threads, which inherit it
    hold_tether(0)
    return _serve(configure)


def _load_ahead(arguments: list[str]) -> None:
    """Import what the worker will need, while its configuration is still being worked out.

    Not for numpy's backend: its BLAS starts threads when it is imported, and they are to inherit
    the CPUs that the process is bound to.
    """
    for backend in ("native", "mock"):
        if f"--backend={backend}" in arguments:
            _set_num_blas_threads(1)
            with contextlib.suppress(ImportError):  # met again, and reported, when it is used
                from furiosa_llm.workers.backends import import_backend

                import_backend(backend)
                import furiosa_llm.workers.loop  # noqa: F401


def _set_num_blas_threads(num_threads: int) -> None:
    """To be called before numpy is imported."""
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(num_threads)


def _serve(configure: Configure) -> int:
    with zmq.Context() as context:
        dealer = connect_dealer(context, configure.endpoint, configure.worker_id, configure.epoch)
        link = FrontEndLink(configure, dealer)
        try:
            loop = _make_loop(configure, link)
        except Exception as error:
            _report_start_failure(configure, link, error)
            dealer.close(linger=START_FAILED_LINGER_MS)
            return EXIT_START_FAILED
        gc.freeze()  # what is there now stays: looking at it took 10 ms of a step now and then
        try:
            loop.run()
        except Exception:
            _log.exception("worker %d cannot go on", configure.worker_id)
            context.destroy(linger=0)
            return EXIT_STEP_FAILED
        link.close()
    return 0


def _make_loop(configure: Configure, link: FrontEndLink) -> WorkerLoop:
    # Imported here because numpy's BLAS starts its threads when it is imported: the process has
    # been bound by now, and of the backends only numpy's multiplies with it.
    _set_num_blas_threads(max(1, len(configure.cpus)) if configure.backend == "numpy" else 1)
    from furiosa_llm.workers.backends import make_executor
    from furiosa_llm.workers.loop import WorkerLoop

    return WorkerLoop(configure, link, make_executor(configure))


def _report_start_failure(configure: Configure, link: FrontEndLink, error: Exception) -> None:
    if not isinstance(error, FuriosaLLMError):  # a defect: the trace helps whoever mends it
        _log.error("worker %d cannot start", configure.worker_id, exc_info=error)
    code, message = to_wire(error)
    link.send(StartFailed, error_code=code, message=clip_text(message))


def _leave(code: int) -> NoReturn:
    """End without tearing the interpreter down: the executor's thread may be inside a step."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
