"""What the state of every chip has in common: complete, checked, and the same after a round trip."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lazymem.errors import SaveStreamError
from lazymem.vm.devices.cmos import Cmos
from lazymem.vm.devices.keyboard import Keyboard
from lazymem.vm.devices.pic import Pic
from lazymem.vm.devices.pit import Pit
from lazymem.vm.devices.systemport import SystemPort
from lazymem.vm.devices.uart import Uart
from lazymem.vm.devicestate import Stateful
from tests.support.chips import HandClock, LineProbe

CHIPS: dict[str, Callable[[], Stateful]] = {
    "pic": Pic,
    "pit": lambda: Pit(HandClock(), LineProbe()),
    "cmos": lambda: Cmos(HandClock(), LineProbe(), epoch_seconds=86_400, ram_bytes=64 << 20),
    "uart": lambda: Uart(LineProbe(), lambda _data: None, lambda _limit: b""),
    "systemport": lambda: SystemPort(HandClock(), Pit(HandClock(), LineProbe())),
    "keyboard": lambda: Keyboard(lambda: None),
}


@pytest.fixture(params=CHIPS)
def new_chip(request: pytest.FixtureRequest) -> Callable[[], Stateful]:
    return CHIPS[request.param]


def test_state_is_what_the_layout_says(new_chip: Callable[[], Stateful]) -> None:
    chip = new_chip()
    state = chip.state()
    assert list(state) == [field.name for field in chip.layout.fields]
    for field in chip.layout.fields:
        value = state[field.name]
        if field.buffer:
            assert isinstance(value, bytes)
            assert len(value) == field.size_bytes
        else:
            assert isinstance(value, int)
            assert value < 1 << (8 * field.size_bytes)


def test_own_state_is_taken_back(new_chip: Callable[[], Stateful]) -> None:
    state, other = new_chip().state(), new_chip()
    other.load_state(state)
    assert other.state() == state


def test_each_field_is_needed_and_checked(new_chip: Callable[[], Stateful]) -> None:
    chip = new_chip()
    before = dict(chip.state())
    for name in before:
        for wrong in (None, "text", -1, 1 << 64):
            broken: dict[str, object] = {**before, name: wrong}
            if wrong is None:
                del broken[name]
            with pytest.raises(SaveStreamError):
                chip.load_state(broken)  # type: ignore[arg-type]
            assert chip.state() == before, "a refused state changes nothing"


@pytest.mark.parametrize(
    ("chip", "name", "value"),
    [
        ("pit", "channel0_count", 0),
        ("pit", "channel2_count", 0x10001),
        ("pit", "channel1_mode", 6),
        ("pit", "channel0_access", 0),
        ("pic", "init_step", 5),
        ("pic", "highest", 8),
        ("uart", "fifo_used", 17),
        ("uart", "fifo", b"short"),
        ("cmos", "cmos", bytes(127)),
        ("cmos", "index", 128),
    ],
)
def test_values_that_no_chip_has_are_refused(chip: str, name: str, value: int | bytes) -> None:
    device = CHIPS[chip]()
    with pytest.raises(SaveStreamError, match=r"device state"):
        device.load_state({**device.state(), name: value})
