"""furiosa_llm.cli: the furiosa-serve command."""
