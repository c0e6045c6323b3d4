"""One module a command: the only place, with the server app, where parts are put together."""
