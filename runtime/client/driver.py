"""Moves bytes between a transport and a connection; what the two shells have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, cast

from furiosa_llm.client.connection import Connection, Deliver, Dial, Effect, HangUp, Send
from furiosa_llm.client.transport import Transport

MAX_MESSAGES_PER_TURN = 256

Command = Callable[[float], list[Effect]]
"""A method of `Connection`, waiting for the time."""


class Asker(Protocol):
    """Who asked for something; the `to` of the connection's effects."""

    def deliver(self, item: Any) -> None:
        """Take what came of it: see `Deliver`. Called where the connection lives; never blocks."""


class Driver:
    """For one thread."""

    def __init__(
        self,
        connection: Connection,
        transport: Transport,
        sockets_changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._transport = transport
        self._sockets_changed = sockets_changed
        self._clock = clock

    def run(self, command: Command) -> None:
        """Do what a caller asks for."""
        self._perform(command(self._clock()))

    def tick(self) -> bool:
        """Let time pass. Returns: whether that made anything happen."""
        effects = self._connection.tick(self._clock())
        self._perform(effects)
        return bool(effects)

    @property
    def sleep_s(self) -> float:
        """How long until `tick` is due; inf for ever."""
        return max(self._connection.deadline_s - self._clock(), 0.0)

    def pump(self) -> bool:
        """Take what has come. Returns: whether more may be there."""
        for _ in range(MAX_MESSAGES_PER_TURN):
            packed = self._transport.receive()
            if packed is None:
                break
            self._perform(self._connection.received(packed, self._clock()))
        else:
            return True
        end = self._transport.end()
        if end is not None:
            reason, is_final = end
            if is_final:
                self._perform(self._connection.refused(reason))
            else:
                self._perform(self._connection.lost(reason, self._clock()))
        return False

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(packed):
                    self._transport.send(packed)
                case Deliver(to, item):
                    cast(Asker, to).deliver(item)
                case Dial():
                    self._dial()
                case HangUp():
                    self._transport.hang_up()
                    self._sockets_changed()

    def _dial(self) -> None:
        self._transport.dial()
        self._sockets_changed()
