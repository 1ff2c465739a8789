"""Looks at an engine from time to time: does it still answer?"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from furiosa_llm.engine.async_llm_engine import AsyncLLMEngine
from furiosa_llm.errors import FuriosaLLMError

_log = logging.getLogger(__name__)


async def health_checks(engine: AsyncLLMEngine, interval_s: float) -> AsyncIterator[None]:
    """Check once in every `interval_s`, and yield whenever the step loops of the workers answered.

    It never ends by itself; that they do not answer is logged, once until they do again.
    """
    is_well = True
    while True:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(interval_s):
                await engine.check_health()
        except (FuriosaLLMError, TimeoutError) as error:
            if is_well:
                _log.error("the workers do not answer: %s", error or "no answer in time")
            is_well = False
        else:
            is_well = True
            yield
        await asyncio.sleep(max(0.0, interval_s - (time.monotonic() - began_s)))
