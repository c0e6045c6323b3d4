"""System port, debug exit, keyboard controller, PCI and VGA ports."""

from __future__ import annotations

import pytest

from lazymem.vm.devices.debugexit import DebugExit
from lazymem.vm.devices.keyboard import COMMAND, DATA, Keyboard
from lazymem.vm.devices.pciconfig import PciConfig
from lazymem.vm.devices.pit import Pit
from lazymem.vm.devices.pitchannel import nanoseconds
from lazymem.vm.devices.systemport import SystemPort
from lazymem.vm.devices.vgaports import VgaPorts
from tests.support.chips import HandClock, LineProbe


def test_time_is_measured_with_channel_2_and_port_61() -> None:
    """As boot code calibrates its time stamp counter: mode 0, gate on, poll the output."""
    clock = HandClock(now_ns=12_345)
    pit = Pit(clock, LineProbe())
    port = SystemPort(clock, pit)
    port.write(0, 1, 0x00)
    pit.write(3, 1, 0xB0)
    for byte in (59659 & 0xFF, 59659 >> 8):
        pit.write(2, 1, byte)
    port.write(0, 1, 0x01)
    start = clock.ns
    clock.ns = start + nanoseconds(59659) - 1
    assert port.read(0, 1) & 0x21 == 0x01
    clock.ns += 1
    assert port.read(0, 1) & 0x21 == 0x21


def test_refresh_bit_toggles_with_time_and_cannot_be_written() -> None:
    clock = HandClock()
    port = SystemPort(clock, Pit(clock, LineProbe()))
    port.write(0, 1, 0xFF)
    assert port.read(0, 1) & 0x13 == 0x03
    clock.ns = 15_085
    assert port.read(0, 1) & 0x13 == 0x13


def test_gate_and_control_are_restored_together() -> None:
    clock = HandClock()
    pit = Pit(clock, LineProbe())
    port = SystemPort(clock, pit)
    port.write(0, 1, 0x01)
    other_pit = Pit(clock, LineProbe())
    other_pit.load_state(pit.state())
    other = SystemPort(clock, other_pit)
    other.load_state(port.state())
    assert other.read(0, 1) == port.read(0, 1)
    assert other_pit.channels[2].registers.gate == 1


def test_debug_exit_tells_the_value() -> None:
    values: list[int] = []
    port = DebugExit(values.append)
    port.write(0, 1, 3)
    port.write(0, 4, 0x1234)
    port.write(1, 1, 9)
    assert (values, port.read(0, 1)) == ([3, 0x1234], 0)


@pytest.fixture
def resets() -> list[str]:
    return []


@pytest.fixture
def keyboard(resets: list[str]) -> Keyboard:
    return Keyboard(lambda: resets.append("reset"))


def test_keyboard_is_empty_and_never_busy(keyboard: Keyboard) -> None:
    assert (keyboard.read(DATA, 1), keyboard.read(COMMAND, 1)) == (0, 0)


def test_pulse_command_resets(keyboard: Keyboard, resets: list[str]) -> None:
    keyboard.write(DATA, 1, 0xFE)
    assert resets == [], "0xFE is data at the other port"
    keyboard.write(COMMAND, 1, 0xFE)
    assert resets == ["reset"]


@pytest.mark.parametrize(("value", "count"), [(0x02, 1), (0x03, 0)])
def test_output_port_resets_when_bit_0_falls(keyboard: Keyboard, resets: list[str], value: int, count: int) -> None:
    keyboard.write(COMMAND, 1, 0xD1)
    again = Keyboard(lambda: resets.append("reset"))
    again.load_state(keyboard.state())
    again.write(DATA, 1, value)
    assert len(resets) == count
    again.write(DATA, 1, 0x00)
    assert len(resets) == count, "only the byte behind the command goes there"


@pytest.mark.parametrize(("size", "value"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)])
def test_no_pci_device_answers(size: int, value: int) -> None:
    ports = PciConfig()
    ports.write(0, 4, 0x8000_0000)
    assert ports.read(4, size) == value


def test_vga_ports_swallow_everything() -> None:
    ports = VgaPorts()
    ports.write(0x24, 1, 0x0E)
    assert ports.read(0x25, 1) == 0
