"""The emulator that maps the RAM file."""
