"""The HTTP API and the socket service of the daemon."""
