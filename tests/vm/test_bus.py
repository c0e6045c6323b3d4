"""Ports to devices: offsets, sizes, nobody home, and mistakes in a map."""

from __future__ import annotations

import pytest

from lazymem.vm.bus import Bus


class Recorder:
    """Answers with what it was asked, and keeps what it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int | None]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size, None))
        return 0x1_2345_6789_ABCD_EF00 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


def test_a_device_sees_offsets() -> None:
    bus, device = Bus(), Recorder()
    bus.map_ports(0x3F8, 8, device)
    bus.map_ports(0x64, 1, device, first_offset=4)
    assert bus.read_port(0x3FD, 1) == 0x05
    assert bus.read_port(0x64, 2) == 0xEF04
    bus.write_port(0x3F8, 4, 0x1_FFFF_FFFF)
    assert device.seen == [(5, 1, None), (4, 2, None), (0, 4, 0xFFFF_FFFF)]


def test_an_access_belongs_to_the_device_at_its_first_port() -> None:
    bus, low, high = Bus(), Recorder(), Recorder()
    bus.map_ports(0xCF8, 1, low)
    bus.map_ports(0xCF9, 1, high)
    bus.write_port(0xCF8, 4, 7)
    assert (low.seen, high.seen) == ([(0, 4, 7)], [])


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)])
def test_nobody_home(size: int, ones: int) -> None:
    bus = Bus()
    assert bus.read_port(0x80, size) == ones
    bus.write_port(0x80, size, 5)


def test_a_port_is_given_away_once() -> None:
    bus = Bus()
    bus.map_ports(0x20, 2, Recorder())
    with pytest.raises(ValueError, match="0x21 is mapped twice"):
        bus.map_ports(0x21, 1, Recorder())


@pytest.mark.parametrize(("base", "count"), [(-1, 1), (0xFFFF, 2), (0x20, 0)])
def test_outside_of_the_port_space(base: int, count: int) -> None:
    with pytest.raises(ValueError, match="outside the port space"):
        Bus().map_ports(base, count, Recorder())
