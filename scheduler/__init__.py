"""furiosa_llm.scheduler: pure decisions. No sockets, clocks, threads or arrays.

Imports nothing of ours.
"""
