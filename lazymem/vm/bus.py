"""Ports: which device answers an access. A device sees offsets into its own range only.

The contract of every device in `vm/devices`:

- `read`, `write`, `state`, `load_state`, `advance` are called on the vCPU thread only, one at a time: no locks inside.
  What comes from elsewhere (a key on the serial line) is carried there by `Machine.post`.
- No device sleeps, opens files or looks at a host clock; time comes from the `Clock` it was given, bytes go out through
  a callable it was given, and an interrupt line is a callable `raise_irq(level: bool)`, called when the level changes.
- A device that needs to be called at a moment is also a `vm.clock.Timer`.

Unclaimed ports read as all ones and swallow writes, as on an ISA bus where nobody drives the lines.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

PORTS = 1 << 16


class Device(Protocol):
    """Registers that a guest reaches by ports, in accesses of 1, 2 or 4 bytes."""

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


class _Target(Struct, frozen=True):
    device: Device
    offset: int


class Bus:
    """The port space. Building it is the machine's work; afterwards it does not change."""

    def __init__(self) -> None:
        self._ports: dict[int, _Target] = {}

    def map_ports(self, base: int, count: int, device: Device, *, first_offset: int = 0) -> None:
        """Give ports ``base`` to ``base + count - 1`` to `device`, as its offsets from `first_offset` on.

        Raises:
            ValueError: outside the port space, or a port is taken: a bug in the machine's map.
        """
        if count < 1 or base < 0 or base + count > PORTS:
            raise ValueError(f"ports {base:#x}+{count} are outside the port space")
        for port in range(base, base + count):
            if port in self._ports:
                raise ValueError(f"port {port:#x} is mapped twice")
        self._ports.update({base + at: _Target(device, first_offset + at) for at in range(count)})

    def read_port(self, port: int, size: int) -> int:
        """IN: an access belongs to the device at its first port."""
        mask = (1 << (8 * size)) - 1
        target = self._ports.get(port)
        return mask if target is None else target.device.read(target.offset, size) & mask

    def write_port(self, port: int, size: int, value: int) -> None:
        """OUT."""
        target = self._ports.get(port)
        if target is not None:
            target.device.write(target.offset, size, value & ((1 << (8 * size)) - 1))
