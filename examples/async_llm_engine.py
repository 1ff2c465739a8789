"""Several prompts at once on an AsyncLLMEngine, streamed to the terminal.

    python examples/async_llm_engine.py --model /path/to/model --devices npu:0:*

`--model` takes a built artifact, a checkpoint directory, a .gguf file or SmolLM2-135M-Instruct.
"""

import argparse
import asyncio
import statistics
import sys
import time

from furiosa_llm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

QUESTIONS = [
    "What is photosynthesis?",
    "Give me three tips for staying healthy.",
    "Why do we have seasons?",
    "Explain what a computer program is.",
]


class Answer:
    """One request: it runs in the background, and its text can be read as it grows."""

    def __init__(self, engine, question, request_id):
        self.num_tokens = 0
        self.first_token_s = None  # after the start
        self._pieces = asyncio.Queue()
        self._task = asyncio.create_task(self._run(engine, question, request_id))

    async def _run(self, engine, question, request_id):
        start, num_shown = time.monotonic(), 0
        prompt = as_prompt(engine, question)
        sampling_params = SamplingParams(temperature=0.0, max_tokens=128)
        try:
            async for output in engine.generate(prompt, sampling_params, request_id):
                if self.first_token_s is None:
                    self.first_token_s = time.monotonic() - start
                # Every output holds all of the answer so far.
                answer = output.outputs[0]
                self._pieces.put_nowait(answer.text[num_shown:])
                num_shown, self.num_tokens = len(answer.text), len(answer.token_ids)
        finally:
            self._pieces.put_nowait(None)

    async def pieces(self):
        """The text as it comes, from its beginning. An error of the request is raised here."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        await self._task


def as_prompt(engine, question):
    """A chat where the model was made for chats, and plain text where it was not."""
    if not engine.tokenizer.has_chat_template:
        return question
    messages = [{"role": "user", "content": question}]
    return {"prompt_token_ids": engine.tokenizer.encode_chat(messages)}


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    AsyncEngineArgs.add_cli_args(parser)
    engine_args = AsyncEngineArgs.from_cli_args(parser.parse_args())

    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        start = time.monotonic()
        # All requests run from here on. The first answer is shown as it is made, while the others
        # gather what they will show when it is their turn: mixed together none could be read.
        answers = [
            Answer(engine, question, f"request-{123 + index}")
            for index, question in enumerate(QUESTIONS)
        ]
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(f"\n>>> {question}")
            async for piece in answer.pieces():
                print(piece, end="", flush=True)
            print()
        elapsed_s = time.monotonic() - start

    num_tokens = sum(answer.num_tokens for answer in answers)
    first_token_s = statistics.median(answer.first_token_s for answer in answers)
    print(
        f"\n{len(answers)} requests, {num_tokens} tokens in {elapsed_s:.2f} s: "
        f"{num_tokens / elapsed_s:.1f} tokens/s, first token after {first_token_s:.3f} s (median)"
    )


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
