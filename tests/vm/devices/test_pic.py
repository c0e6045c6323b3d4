"""The 8259A pair, as the data sheet reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymem.vm.devices.pic import Pic, PicPair

COMMAND, DATA = 0, 1
EOI, READ_IRR, READ_ISR, POLL = 0x20, 0x0A, 0x0B, 0x0C


def initialise(pic: Pic, *, base: int = 0x20, icw1: int = 0x11, icw3: int = 0, icw4: int = 0x01, mask: int = 0) -> None:
    pic.write(COMMAND, 1, icw1)
    pic.write(DATA, 1, base)
    if not icw1 & 2:
        pic.write(DATA, 1, icw3)
    if icw1 & 1:
        pic.write(DATA, 1, icw4)
    pic.write(DATA, 1, mask)


def ready_pic(icw1: int = 0x11, icw4: int = 0x01) -> Pic:
    pic = Pic()
    initialise(pic, icw1=icw1, icw4=icw4)
    return pic


@pytest.fixture
def pair() -> PicPair:
    pair = PicPair()
    initialise(pair.master, base=0x20, icw3=0x04)
    initialise(pair.slave, base=0x28, icw3=0x02)
    return pair


def isr(pic: Pic) -> int:
    pic.write(COMMAND, 1, READ_ISR)
    return pic.read(COMMAND, 1)


def irr(pic: Pic) -> int:
    pic.write(COMMAND, 1, READ_IRR)
    return pic.read(COMMAND, 1)


@pytest.mark.parametrize("icw1", [0x11, 0x10, 0x13, 0x12])
def test_initialisation_takes_as_many_words_as_icw1_says(icw1: int) -> None:
    pic = Pic()
    words = 1 + (not icw1 & 2) + (icw1 & 1)
    pic.write(COMMAND, 1, icw1)
    for _ in range(words):
        pic.write(DATA, 1, 0x08)
        assert pic.read(DATA, 1) == 0, "an initialisation word is no mask"
    pic.write(DATA, 1, 0xA5)
    assert pic.read(DATA, 1) == 0xA5


def test_initialisation_clears_mask_requests_and_service() -> None:
    pic = ready_pic()
    pic.set_line(0, True)
    pic.acknowledge()
    pic.set_line(1, True)
    pic.write(DATA, 1, 0xF0)
    initialise(pic)
    assert (irr(pic), isr(pic), pic.read(DATA, 1), pic.pending()) == (0, 0, 0, False)


def test_nothing_is_asked_in_the_middle_of_initialisation() -> None:
    pic = ready_pic()
    pic.write(COMMAND, 1, 0x11)
    pic.set_line(3, True)
    assert not pic.pending()
    for word in (0x20, 0, 1):
        pic.write(DATA, 1, word)
    assert pic.pending()


def test_an_edge_asks_once() -> None:
    pic = ready_pic()
    pic.set_line(3, True)
    assert pic.pending()
    assert irr(pic) == 0x08
    assert pic.acknowledge() == 3
    assert (irr(pic), isr(pic)) == (0, 0x08)
    pic.write(COMMAND, 1, EOI)
    pic.set_line(3, True)
    assert not pic.pending(), "a line that stays high is no edge"
    pic.set_line(3, False)
    pic.set_line(3, True)
    assert pic.pending()


def test_an_edge_is_kept_when_the_line_drops() -> None:
    pic = ready_pic()
    pic.set_line(3, True)
    pic.set_line(3, False)
    assert pic.acknowledge() == 3


def test_lower_number_goes_first_and_holds_the_others_back() -> None:
    pic = ready_pic()
    for line in (5, 1, 3):
        pic.set_line(line, True)
    served = []
    for _ in range(3):
        served.append(pic.acknowledge())
        assert not pic.pending()
        pic.write(COMMAND, 1, EOI)
    assert served == [1, 3, 5]


def test_higher_priority_interrupts_a_service() -> None:
    pic = ready_pic()
    pic.set_line(5, True)
    assert pic.acknowledge() == 5
    pic.set_line(2, True)
    assert pic.acknowledge() == 2
    assert isr(pic) == 0x24
    pic.write(COMMAND, 1, EOI)
    assert isr(pic) == 0x20, "an unspecific EOI ends the highest"
    pic.write(COMMAND, 1, 0x60 | 5)
    assert isr(pic) == 0, "a specific EOI ends the one it names"


def test_mask_holds_back_and_keeps() -> None:
    pic = ready_pic()
    pic.write(DATA, 1, 0x08)
    pic.set_line(3, True)
    assert not pic.pending()
    assert irr(pic) == 0x08
    pic.write(DATA, 1, 0)
    assert pic.acknowledge() == 3


def test_request_masked_before_acknowledge_is_spurious() -> None:
    pic = ready_pic()
    pic.set_line(3, True)
    pic.write(DATA, 1, 0xFF)
    assert pic.acknowledge() == 7
    assert isr(pic) == 0, "a spurious interrupt is not in service"


def test_level_request_follows_its_line() -> None:
    pic = ready_pic(icw1=0x19)
    pic.set_line(4, True)
    assert pic.acknowledge() == 4
    pic.write(COMMAND, 1, EOI)
    assert pic.pending(), "still high"
    pic.set_line(4, False)
    assert not pic.pending()
    assert pic.acknowledge() == 7


def test_automatic_eoi() -> None:
    pic = ready_pic(icw4=0x03)
    pic.set_line(6, True)
    assert pic.acknowledge() == 6
    assert isr(pic) == 0


def test_rotation_puts_the_served_one_last() -> None:
    pic = ready_pic()
    pic.set_line(2, True)
    pic.acknowledge()
    pic.write(COMMAND, 1, 0xA0)
    for line in (2, 3):
        pic.set_line(line, False)
        pic.set_line(line, True)
    assert pic.acknowledge() == 3
    pic.write(COMMAND, 1, 0xE0 | 3)
    assert pic.acknowledge() == 2


def test_rotation_in_automatic_eoi() -> None:
    pic = ready_pic(icw4=0x03)
    pic.write(COMMAND, 1, 0x80)
    served = []
    for _ in range(3):
        for line in (0, 1):
            pic.set_line(line, False)
            pic.set_line(line, True)
        served.append(pic.acknowledge())
    assert served == [0, 1, 0]


def test_priority_is_set_by_command() -> None:
    pic = ready_pic()
    pic.write(COMMAND, 1, 0xC0 | 4)
    for line in (0, 4, 5):
        pic.set_line(line, True)
    assert pic.acknowledge() == 5, "4 is lowest, so 5 is highest"


def test_special_mask_mode_lets_lower_ones_through() -> None:
    pic = ready_pic()
    pic.set_line(1, True)
    assert pic.acknowledge() == 1
    pic.set_line(6, True)
    assert not pic.pending()
    pic.write(DATA, 1, 0x02)
    pic.write(COMMAND, 1, 0x68)
    assert pic.acknowledge() == 6
    pic.write(COMMAND, 1, EOI)
    assert isr(pic) == 0x02, "an unspecific EOI leaves masked ones alone"


def test_poll_acknowledges_by_reading() -> None:
    pic = ready_pic()
    pic.write(COMMAND, 1, POLL)
    assert pic.read(COMMAND, 1) == 0
    pic.set_line(5, True)
    pic.write(COMMAND, 1, POLL)
    assert pic.read(COMMAND, 1) == 0x85
    assert isr(pic) == 0x20


def test_slave_line_comes_through_the_master(pair: PicPair) -> None:
    pair.line(12)(True)
    assert pair.pending()
    assert pair.acknowledge() == 0x28 + 4
    assert (isr(pair.master), isr(pair.slave)) == (0x04, 0x10)
    pair.slave.write(COMMAND, 1, EOI)
    pair.master.write(COMMAND, 1, EOI)
    assert not pair.pending()


def test_slave_stands_at_the_masters_second_place(pair: PicPair) -> None:
    for line in (3, 8, 1):
        pair.line(line)(True)
    served = []
    while pair.pending():
        served.append(pair.acknowledge())
        if served[-1] >= 0x28:
            pair.slave.write(COMMAND, 1, EOI)
        pair.master.write(COMMAND, 1, EOI)
    assert served == [0x21, 0x28, 0x23]


def test_next_slave_request_is_heard_after_the_first(pair: PicPair) -> None:
    pair.line(8)(True)
    pair.line(9)(True)
    assert pair.acknowledge() == 0x28
    pair.slave.write(COMMAND, 1, EOI)
    pair.master.write(COMMAND, 1, EOI)
    assert pair.acknowledge() == 0x29


def test_next_slave_request_is_heard_with_automatic_eoi(pair: PicPair) -> None:
    initialise(pair.slave, base=0x28, icw3=0x02, icw4=0x03)
    pair.line(8)(True)
    pair.line(9)(True)
    assert pair.acknowledge() == 0x28
    pair.master.write(COMMAND, 1, EOI)
    assert pair.acknowledge() == 0x29


def test_spurious_slave_interrupt_is_in_the_masters_service(pair: PicPair) -> None:
    pair.line(8)(True)
    pair.slave.write(DATA, 1, 0xFF)
    assert pair.acknowledge() == 0x28 + 7
    assert (isr(pair.master), isr(pair.slave)) == (0x04, 0)


def test_special_fully_nested_master_lets_the_slave_interrupt_itself(pair: PicPair) -> None:
    initialise(pair.master, base=0x20, icw3=0x04, icw4=0x11)
    pair.line(12)(True)
    assert pair.acknowledge() == 0x2C
    pair.line(8)(True)
    assert pair.acknowledge() == 0x28


ACTIONS = st.one_of(
    st.tuples(st.just("line"), st.integers(0, 7), st.booleans()),
    st.tuples(st.just("write"), st.sampled_from([COMMAND, DATA]), st.integers(0, 255)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
    st.tuples(st.just("read"), st.sampled_from([COMMAND, DATA]), st.just(0)),
)


def act(pic: Pic, action: tuple[str, int, int]) -> int:
    kind, where, value = action
    if kind == "line":
        pic.set_line(where, bool(value))
    elif kind == "write":
        pic.write(where, 1, value)
    elif kind == "acknowledge":
        return pic.acknowledge()
    else:
        return pic.read(where, 1)
    return 0


@given(before=st.lists(ACTIONS, max_size=30), after=st.lists(ACTIONS, max_size=30))
def test_loaded_chip_behaves_like_the_saved_one(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    saved = ready_pic()
    for action in before:
        act(saved, action)
    loaded = Pic()
    loaded.load_state(saved.state())
    assert loaded.pending() == saved.pending()
    for action in after:
        assert act(loaded, action) == act(saved, action)
        assert loaded.pending() == saved.pending()
