"""furiosa_llm.workers.kernels: the forward step, in numpy (the oracle) and in C++."""
