"""The VGA's register ports, without a VGA behind them: text programs move the cursor and are ignored. Stateless.

The text memory at 0xB8000 is ordinary RAM.
"""

from __future__ import annotations


class VgaPorts:
    """Offsets 0 to 47, in a PC at port 0x3B0. Reads give 0."""

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignored."""
