"""A running guest handed from host to host: who may run it, what is written down before that, and the way there."""
