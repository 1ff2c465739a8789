"""A load generator for servers of language models: sends requests, times every token."""
