"""furiosa_llm.engine: the front-end: routing, supervision, and the public engine classes."""
