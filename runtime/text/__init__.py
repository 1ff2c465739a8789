"""furiosa_llm.text: between text and token ids: tokenizer, detokenizer, stop strings, templates."""
