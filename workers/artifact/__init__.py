"""furiosa_llm.workers.artifact: the on-disk model format, its builders and its packed weights."""
