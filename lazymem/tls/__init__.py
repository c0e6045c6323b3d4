"""TLS: contexts from files, a connection without its socket, and what goes wrong with both in one line."""
