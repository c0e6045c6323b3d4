"""PCI configuration ports of a machine without PCI: every read gives all ones, which says "no device". Stateless."""

from __future__ import annotations


class PciConfig:
    """Offsets 0 to 7, in a PC at port 0xCF8."""

    def read(self, offset: int, size: int) -> int:
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing: no mechanism to select anything."""
