"""furiosa_llm.scheduler: pure decisions. No sockets, clocks, threads or arrays; imports nothing of ours."""
