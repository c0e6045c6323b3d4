"""What tests of memtest86+ have in common."""

from __future__ import annotations

import re

MISREAD_MHZ = 2000
"""The guest's clock is 1,000 MHz."""


def misread_clock(screen: str) -> bool:
    """Whether it took its clock for much faster than it is.

    It measures that once, against the timer, and when a busy machine holds the emulator up right then it is far off.
    What it does each second, drawing its screen too, then takes minutes: start another one.
    """
    found = re.search(r"CLK/Temp: *([0-9]+) *MHz", screen)
    return found is not None and int(found[1]) > MISREAD_MHZ
