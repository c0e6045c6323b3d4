"""Ports and memory-mapped registers: which device answers an access. A device sees offsets into its own range only.

The contract of every device in `vm/devices`:

- `read`, `write`, `state`, `load_state`, `advance` are called on the vCPU thread only, one at a time: no locks inside.
  What comes from elsewhere (a key on the serial line) is carried there by `Machine.post`.
- No device sleeps, opens files or looks at a host clock; time comes from the `Clock` it was given, bytes go out through
  a callable it was given, and an interrupt line is a callable `raise_irq(level: bool)`, called when the level changes.
- A device that needs to be called at a moment is also a `vm.clock.Timer`.

Unclaimed ports read as all ones and swallow writes, as on an ISA bus where nobody drives the lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

PORTS = 1 << 16


class Device(Protocol):
    """Registers that a guest reaches by ports or memory-mapped accesses of 1, 2 or 4 bytes (MMIO: also 8)."""

    def read(self, offset: int, size: int) -> int:
        """The value at `offset`, an unsigned integer of `size` bytes (higher bits are cut off by the bus)."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """`value` is unsigned and fits `size` bytes."""
        ...


class InterruptController(Protocol):
    """What the CPU sees of the 8259 pair."""

    def pending(self) -> bool:
        """Level of the INTR line. Asked between slices: cheap, changes nothing."""
        ...

    def acknowledge(self) -> int:
        """The INTA cycle: the vector to deliver; the request goes into service. A request that has gone away gives the
        spurious vector, as the chip does."""
        ...


@dataclass(frozen=True, slots=True)
class _Range:
    base: int
    size: int
    device: Device


class Bus:
    """The port space. Building it is the machine's work; afterwards it does not change."""

    def __init__(self) -> None:
        self._ports: dict[int, _Range] = {}

    def map_ports(self, base: int, count: int, device: Device) -> None:
        """Give ports ``base`` to ``base + count - 1`` to `device`.

        Raises:
            ValueError: outside the port space, or a port is taken: a bug in the machine's map.
        """
        if count < 1 or base < 0 or base + count > PORTS:
            raise ValueError(f"ports {base:#x}+{count} are outside the port space")
        taken = [port for port in range(base, base + count) if port in self._ports]
        if taken:
            raise ValueError(f"port {taken[0]:#x} is mapped twice")
        entry = _Range(base, count, device)
        self._ports.update((port, entry) for port in range(base, base + count))

    def read_port(self, port: int, size: int) -> int:
        """IN: an access belongs to the device at its first port."""
        mask = (1 << (8 * size)) - 1
        entry = self._ports.get(port)
        if entry is None:
            return mask
        return entry.device.read(port - entry.base, size) & mask

    def write_port(self, port: int, size: int, value: int) -> None:
        """OUT."""
        entry = self._ports.get(port)
        if entry is not None:
            entry.device.write(port - entry.base, size, value & ((1 << (8 * size)) - 1))
