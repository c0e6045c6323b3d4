"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# How long one example takes says how busy the machine is, and nothing about the code: a test that is stuck meets
# pytest-timeout.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
