"""A small OpenAI-like server, scripted by the test: what it answers, when, and how it fails."""

import asyncio
import contextlib
import json


def text_event(text, **fields):
    return event({"choices": [{"index": 0, "text": text}], "usage": None, **fields})


def event(answer):
    return f"data: {json.dumps(answer)}\n\n".encode()


def usage_event(prompt_tokens, completion_tokens):
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return event({"choices": [], "usage": usage})


DONE = b"data: [DONE]\n\n"


class FakeServer:
    """Answers every POST by `answer(body, writer)`, a coroutine; keeps what it was asked."""

    def __init__(self, answer=None, *, closes=False):
        self.answer = answer or self.stream_of_asked_length
        self.closes = closes  # the connection, after each answer
        self.bodies = []
        self.paths = []
        self.headers = []
        self.num_connections = 0
        self.num_open = self.max_open = 0  # requests being answered

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._tasks = set()
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self.num_connections += 1
        self._tasks.add(asyncio.current_task())
        try:
            # Cancelled at the end of the test: asyncio.streams would log that as an error.
            with contextlib.suppress(
                ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
            ):
                await self._serve_connection(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve_connection(self, reader, writer):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            request_line, *lines = head.strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            method, path, _ = request_line.split()
            self.paths.append(path)
            self.headers.append(headers)
            if method == "GET":
                await self.get(path, writer)
                continue
            self.bodies.append(json.loads(body))
            self.num_open += 1
            self.max_open = max(self.max_open, self.num_open)
            try:
                await self.answer(self.bodies[-1], writer)
            finally:
                self.num_open -= 1
            if self.closes or headers.get("connection") == "close" or writer.is_closing():
                return

    async def get(self, path, writer):
        await whole(writer, 200, {"object": "list", "data": [{"id": "the-model"}]})

    async def stream_of_asked_length(self, body, writer):
        """One event a token, one event a chunk, then usage."""
        await begin_stream(writer)
        for index in range(body["max_tokens"]):
            await chunk(writer, text_event(f" {index}"))
        await chunk(writer, usage_event(len(body["prompt"]), body["max_tokens"]))
        await chunk(writer, DONE)
        await end_stream(writer)


async def whole(writer, status, answer, *, headers=""):
    body = json.dumps(answer).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def begin_stream(writer):
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    await writer.drain()


async def chunk(writer, content):
    writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
    await writer.drain()


async def end_stream(writer):
    writer.write(b"0\r\n\r\n")
    await writer.drain()
