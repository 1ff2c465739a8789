"""The client library: talks to a daemon over its socket, without the engine."""
