"""The PC's board: which chip is at which port and on which interrupt line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lazymem.vm.bus import Bus
from lazymem.vm.clock import Clock, Timer
from lazymem.vm.devices.cmos import Cmos
from lazymem.vm.devices.debugexit import DebugExit
from lazymem.vm.devices.keyboard import COMMAND, Keyboard
from lazymem.vm.devices.pciconfig import PciConfig
from lazymem.vm.devices.pic import PicPair
from lazymem.vm.devices.pit import Pit
from lazymem.vm.devices.resetcontrol import ResetControl
from lazymem.vm.devices.systemport import SystemPort
from lazymem.vm.devices.uart import Uart
from lazymem.vm.devices.vgaports import VgaPorts
from lazymem.vm.devicestate import Stateful

TIMER_IRQ, SERIAL_IRQ, CLOCK_IRQ = 0, 4, 8


class SerialBytes(Protocol):
    """The part of `vm.serial.SerialLine` that a UART needs."""

    def write(self, data: bytes) -> None: ...

    def read(self, limit: int) -> bytes: ...


class Board:
    """All chips, wired. `debug_exit` is called with the value a guest wrote, `reset` when it asked for a reset."""

    def __init__(
        self,
        clock: Clock,
        serial: SerialBytes,
        *,
        ram_bytes: int,
        epoch_seconds: int,
        debug_exit: Callable[[int], None],
        reset: Callable[[], None],
    ) -> None:
        self.bus = Bus()
        self.interrupts = PicPair()
        line = self.interrupts.line
        self.pit = Pit(clock, line(TIMER_IRQ))
        self.uart = Uart(line(SERIAL_IRQ), serial.write, serial.read)
        self.cmos = Cmos(clock, line(CLOCK_IRQ), epoch_seconds=epoch_seconds, ram_bytes=ram_bytes)
        self.system_port = SystemPort(clock, self.pit)
        self.keyboard = Keyboard(reset)
        self._map_ports(debug_exit, reset)

    @property
    def timers(self) -> tuple[Timer, ...]:
        return self.pit, self.cmos

    @property
    def stateful(self) -> tuple[Stateful, ...]:
        """Every chip that has a state, in the order of the save stream."""
        pics = self.interrupts
        return pics.master, pics.slave, self.pit, self.system_port, self.cmos, self.keyboard, self.uart

    def _map_ports(self, debug_exit: Callable[[int], None], reset: Callable[[], None]) -> None:
        ports, pci = self.bus.map_ports, PciConfig()
        ports(0x20, 2, self.interrupts.master)
        ports(0x40, 4, self.pit)
        ports(0x60, 1, self.keyboard)
        ports(0x61, 1, self.system_port)
        ports(0x64, 1, self.keyboard, first_offset=COMMAND)
        ports(0x70, 2, self.cmos)
        ports(0xA0, 2, self.interrupts.slave)
        ports(0xF4, 1, DebugExit(debug_exit))
        ports(0x3B0, 48, VgaPorts())
        ports(0x3F8, 8, self.uart)
        ports(0xCF8, 1, pci)
        ports(0xCF9, 1, ResetControl(reset))
        ports(0xCFA, 6, pci, first_offset=2)
