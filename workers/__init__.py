"""furiosa_llm.workers: the process of one data-parallel group, and the artifacts it runs."""
