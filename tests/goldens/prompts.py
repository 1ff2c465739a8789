"""What the SmolLM2 goldens are asked: chat questions and plain text of many kinds.

`generate.py` refuses a prompt whose greedy continuation passes through a near tie, which rounding
could decide either way.
"""

CHAT_PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "List three uses of a hammer.",
    "What is 17 plus 25?",
    "Write a short poem about the sea.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "How do I boil an egg?",
    "Give me a name for a black cat.",
    "What is the difference between a list and a tuple in Python?",
    "Was ist die Hauptstadt von Deutschland?",
    "¿Cuántos días tiene una semana?",
    "日本の首都はどこですか？",
    "Is water wet? 🌊",
)
TEXT_PROMPTS = (
    "The quick brown fox",
    "Once upon a time, in a village by the mountains, there lived",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\nx = np.zeros((3, 4))\nprint(",
    "SELECT name, COUNT(*) FROM users",
    "#include <stdio.h>\n\nint main(void) {\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "3.14159265358979",
    "| name | age |\n| --- | --- |\n| Ann | 31 |\n|",
    "La révolution française commence en",
    "Der schnelle braune Fuchs springt",
    "Москва — столица",
    '{"id": 7, "tags": ["red", "green"], "size":',
    "Water boils at 100 degrees Celsius. Ice melts at",
)


def chat_text(question: str) -> str:
    """The model's chat template, filled with one question."""
    return (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def prompt_texts() -> list[str]:
    """Every prompt as the text that is tokenised."""
    return [*(chat_text(question) for question in CHAT_PROMPTS), *TEXT_PROMPTS]
