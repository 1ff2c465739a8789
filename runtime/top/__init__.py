"""What `furiosa-serve top` shows of a running server."""
