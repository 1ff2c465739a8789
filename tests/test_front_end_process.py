"""FrontEndProcess: what the daemon sees of another front-end, whenever that one dies."""

import asyncio
import os
import signal
import sys

import pytest
import uvloop

from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.server.front_end import READY_ID
from furiosa_llm.server.front_ends import FrontEndProcess

SERVES_AND_IS_SILENT = f"""#!/bin/sh
read setup
echo '{{"id": {READY_ID}}}'
exec sleep 60
"""


class AnySetup:
    def to_json(self):
        return "{}"


@pytest.fixture
def silent_program(tmp_path, monkeypatch):
    program = tmp_path / "front-end"
    program.write_text(SERVES_AND_IS_SILENT)
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))


def test_asked_while_it_dies_says_that_it_died(silent_program):
    async def ask_until_it_is_gone():
        process = FrontEndProcess(1, AnySetup())
        await process.start()
        pid = process.pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead; the loop has yet to notice
        while process.pid is not None:
            with pytest.raises(FuriosaLLMError, match=f"has not answered|pid {pid}.*signal 9"):
                await process.ask("report", patience_s=0.0)
        with pytest.raises(FuriosaLLMError, match="is not running"):
            await process.ask("report")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ask_until_it_is_gone())
