"""What holds for all tests."""

import signal

from hypothesis import HealthCheck, settings

# How long one example takes says how busy the machine is, and nothing about the code: a test that is stuck meets
# pytest-timeout.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

# A shell has Ctrl-C ignored by what it starts in the background, and children inherit that. Some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
