"""The two guests, built from their sources and run on the machine: counting, filling, finding what is wrong."""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazymem.errors import EnvironmentRefusedError, UsageError
from lazymem.pages import PAGE_SIZE
from lazymem.vm.bootelf import parse_elf
from lazymem.vm.guests import GUESTS, SOURCES, build_guest
from lazymem.vm.machine import MachineConfig
from tests.support.machines import MIB, Rig
from tests.support.stalledpages import StalledPages

STEP = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1
FIRST_ADDRESS = 2 * MIB
RAM_BYTES = 8 * MIB
PAGES = 1534
"""Of 8 MiB, 1536 pages lie from 2 MiB on; two hold the generations, 4 bytes a page."""

START = FIRST_ADDRESS + 2 * PAGE_SIZE

NewRig = Callable[[MachineConfig], Rig]


@pytest.fixture(scope="session")
def guest_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guests")
    for name in GUESTS:
        build_guest(name, folder)
    return folder


@pytest.fixture
def new_rig() -> Iterator[NewRig]:
    rigs: list[Rig] = []

    def make(config: MachineConfig) -> Rig:
        rigs.append(Rig(config))
        return rigs[-1]

    yield make
    for rig in rigs:
        with rig:
            pass


class PagesGuest:
    """Talks to a running `pages` guest: one command, one answer; tick lines are told apart."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._seen = 0

    def answer(self) -> str:
        """The next line that is no tick."""
        sent = self._rig.line.wait_for(lambda data: len(self._answers(data)) > self._seen)
        self._seen += 1
        return self._answers(sent)[self._seen - 1]

    def ask(self, command: str) -> str:
        self._rig.line.type(command.encode() + b"\n")
        return self.answer()

    def answered(self) -> bool:
        """Whether an answer is there that was not taken."""
        return len(self._answers(self._rig.line.sent)) > self._seen

    def status(self) -> dict[str, int]:
        words = self.ask("status").split()
        assert words[0] == "status"
        return {name: int(value) for name, value in zip(words[1::2], words[2::2], strict=True)}

    @staticmethod
    def _answers(data: bytes) -> list[str]:
        lines = data.decode("ascii").split("\n")[:-1]
        return [line for line in lines if not re.fullmatch(r"tick \d+", line)]


@pytest.fixture
def rig(new_rig: NewRig, guest_folder: Path) -> Rig:
    return new_rig(MachineConfig(RAM_BYTES, kernel=guest_folder / "pages")).boot()


@pytest.fixture
def guest(rig: Rig) -> PagesGuest:
    guest = PagesGuest(rig)
    assert guest.answer() == "ready"
    return guest


def flip(rig: Rig, address: int) -> None:
    ram = rig.blocks["pc.ram"]
    ram.write(address, bytes((ram.read(address, 1)[0] ^ 0x40,)))


def mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & WORD
    return value ^ value >> 31


def page_pattern(address: int, seed: int, generation: int = 0) -> bytes:
    """As the head of pages.S says it."""
    key = mix(mix(seed + generation * STEP & WORD) + address & WORD)
    return struct.pack("<512Q", *((key + place * STEP) & WORD for place in range(512)))


@pytest.mark.parametrize("name", GUESTS)
def test_guest_is_a_kernel_below_2_mib(guest_folder: Path, name: str) -> None:
    kernel = parse_elf((guest_folder / name).read_bytes())
    assert all(MIB <= segment.address < segment.end <= FIRST_ADDRESS for segment in kernel.segments)
    assert [path.name for path in sorted(guest_folder.iterdir())] == sorted(GUESTS), "nothing is left beside them"


def test_building_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no guest named 'other'; there are heartbeat, pages"):
        build_guest("other", tmp_path)
    with pytest.raises(UsageError, match="No such file or directory"):
        build_guest("pages", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentRefusedError, match=r"'as' is missing, .*: install binutils"):
        build_guest("pages", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_assembler_for_another_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "as"
    fake.write_text("#!/bin/sh\necho 'first' >&2\necho 'unrecognized option --64' >&2\nexit 1\n")
    fake.chmod(0o755)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda tool: str(fake) if tool == "as" else which(tool))
    with pytest.raises(EnvironmentRefusedError, match=r"x86-64\?\): unrecognized option --64$"):
        build_guest("heartbeat", tmp_path)


def ticks_of(data: bytes) -> list[int]:
    lines = data.decode("ascii").split("\n")
    assert lines[0] == "ready"
    return [int(line.removeprefix("tick ")) for line in lines[1:-1]]


@pytest.mark.parametrize("icount", [False, True])
def test_heartbeat_counts_every_tenth_tick(new_rig: NewRig, guest_folder: Path, icount: bool) -> None:
    config = MachineConfig(2 * MIB, kernel=guest_folder / "heartbeat", icount=icount, icount_sleep=False)
    rig = new_rig(config).boot()
    ticks = ticks_of(rig.line.wait_for(lambda data: data.count(b"\n") > 5))
    assert ticks == [10 * (number + 1) for number in range(len(ticks))]


def test_heartbeat_ticks_a_hundred_times_a_virtual_second(new_rig: NewRig, guest_folder: Path) -> None:
    config = MachineConfig(2 * MIB, kernel=guest_folder / "heartbeat", icount=True, icount_sleep=False)
    rig = new_rig(config).boot()
    rig.line.wait_for(lambda data: b"tick 300\n" in data)
    rig.machine.stop()
    (ticks,) = ticks_of(rig.line.sent)[-1:]
    seconds = rig.machine.cpu.time_stamp() / 1e9
    assert seconds == pytest.approx(ticks / 100, abs=0.11)


def test_heartbeat_goes_on_counting_after_a_resume(new_rig: NewRig, guest_folder: Path) -> None:
    config = MachineConfig(2 * MIB, kernel=guest_folder / "heartbeat", icount=True, icount_sleep=False)
    source = new_rig(config).boot()
    source.line.wait_for(lambda data: b"tick 50\n" in data)
    source.machine.stop()
    sent = source.line.sent
    destination = new_rig(config).load(source.save())
    destination.machine.start()
    resumed = destination.line.wait_for(lambda data: data.count(b"\n") > 5)
    ticks = ticks_of(sent + resumed[: resumed.rindex(b"\n") + 1])
    assert ticks == [10 * (number + 1) for number in range(len(ticks))]


def test_fill_writes_the_documented_pattern(rig: Rig, guest: PagesGuest) -> None:
    seed = 0xFEDC_BA98_7654_3210
    assert guest.ask(f"fill {seed:#x}") == f"filled {PAGES}"
    ram = rig.blocks["pc.ram"]
    for page in (0, 1, 700, PAGES - 1):
        address = START + page * PAGE_SIZE
        assert ram.read(address, PAGE_SIZE) == page_pattern(address, seed)
    assert address + PAGE_SIZE == RAM_BYTES, "up to the last byte"


def test_verify_finds_nothing_where_all_is_right(guest: PagesGuest) -> None:
    guest.ask("fill 42")
    for _ in range(3):
        assert guest.ask("verify") == f"verified {PAGES} bad 0 first_bad none"


def test_verify_visits_every_page_once_in_an_order_that_nobody_guesses(rig: Rig, guest: PagesGuest) -> None:
    """Else a kernel's read-ahead would bring the pages, and nothing would have been shown of faults."""
    guest.ask("fill 42")
    orders = []
    for _ in range(2):
        with StalledPages(rig.blocks["pc.ram"].address + START, PAGES) as pages:
            rig.line.type(b"verify\n")
            orders.append([pages.let_next() for _ in range(PAGES)])
            assert guest.answer() == f"verified {PAGES} bad {PAGES} first_bad {START:#x}"
    for order in orders:
        assert sorted(order) == list(range(PAGES))
        neighbours = sum(abs(late - early) == 1 for early, late in itertools.pairwise(order))
        assert neighbours < PAGES // 50
    assert orders[0] != orders[1], "another order each time"


@pytest.mark.parametrize("address", [START, 0x456789, RAM_BYTES - 1])
def test_a_single_wrong_bit_is_found_at_its_place(rig: Rig, guest: PagesGuest, address: int) -> None:
    guest.ask("fill 42")
    flip(rig, address)
    assert guest.ask("verify") == f"verified {PAGES} bad 1 first_bad {address & ~7:#x}"
    flip(rig, address)
    assert guest.ask("verify") == f"verified {PAGES} bad 0 first_bad none"


def test_pages_are_counted_and_the_lowest_place_is_told(rig: Rig, guest: PagesGuest) -> None:
    guest.ask("fill 7")
    for address in (0x600010, 0x600020, 0x500FF8, 0x700000):
        flip(rig, address)
    for _ in range(3):
        assert guest.ask("verify") == f"verified {PAGES} bad 3 first_bad 0x500ff8"


def test_two_pages_exchanged_are_both_wrong(rig: Rig, guest: PagesGuest) -> None:
    guest.ask("fill 7")
    ram = rig.blocks["pc.ram"]
    one, other = ram.read(0x300000, PAGE_SIZE), ram.read(0x301000, PAGE_SIZE)
    ram.write(0x300000, other)
    ram.write(0x301000, one)
    assert guest.ask("verify") == f"verified {PAGES} bad 2 first_bad 0x300000"


@pytest.mark.parametrize("count", [1, 100, PAGES])
def test_rewrite_changes_exactly_so_many_pages(rig: Rig, guest: PagesGuest, count: int) -> None:
    guest.ask("fill 42")
    ram = rig.blocks["pc.ram"]

    def contents() -> list[bytes]:
        return [ram.read(at, PAGE_SIZE) for at in range(START, RAM_BYTES, PAGE_SIZE)]

    before = contents()
    assert guest.ask(f"rewrite {count} 5") == f"rewrote {count}"
    changed = [page for page, (old, new) in enumerate(zip(before, contents(), strict=True)) if old != new]
    assert len(changed) == count
    address = START + PAGE_SIZE * changed[0]
    assert ram.read(address, PAGE_SIZE) == page_pattern(address, 42, generation=1)
    assert guest.ask("verify") == f"verified {PAGES} bad 0 first_bad none"


def test_rewrites_add_up_and_old_contents_are_wrong_then(rig: Rig, guest: PagesGuest) -> None:
    guest.ask("fill 42")
    ram = rig.blocks["pc.ram"]
    old = ram.read(START, PAGES * PAGE_SIZE)
    assert guest.ask("rewrite 300 1") == "rewrote 300"
    assert guest.ask("rewrite 300 2") == "rewrote 300"
    assert guest.ask("rewrite 9999999 3") == f"rewrote {PAGES}"
    assert guest.ask("verify") == f"verified {PAGES} bad 0 first_bad none"
    assert guest.status()["generation"] == 3
    ram.write(START, old)
    assert guest.ask("verify") == f"verified {PAGES} bad {PAGES} first_bad {START:#x}"


def test_part_of_ram(rig: Rig, guest: PagesGuest) -> None:
    untouched = rig.blocks["pc.ram"].read(RAM_BYTES - PAGE_SIZE, PAGE_SIZE)
    assert guest.ask("fill 9 10 1000") == "filled 10"
    assert guest.ask("verify") == "verified 10 bad 0 first_bad none"
    assert rig.blocks["pc.ram"].read(RAM_BYTES - PAGE_SIZE, PAGE_SIZE) == untouched
    first = START + PAGE_SIZE * 1000
    flip(rig, first - 1)
    flip(rig, first + 10 * PAGE_SIZE)
    assert guest.ask("verify") == "verified 10 bad 0 first_bad none", "outside the part"
    flip(rig, first + 10 * PAGE_SIZE - 1)
    assert guest.ask("verify") == f"verified 10 bad 1 first_bad {first + 10 * PAGE_SIZE - 8:#x}"
    assert guest.status() | {"ticks": 0} == {"ticks": 0, "pages": PAGES, "filled": 10, "seed": 9, "generation": 0}


def test_ram_above_4_gib_is_used(new_rig: NewRig, guest_folder: Path) -> None:
    """Only the pages that are filled are touched: ordinary memory of any size costs nothing here."""
    rig = new_rig(MachineConfig(4096 * MIB, kernel=guest_folder / "pages")).boot()
    guest = PagesGuest(rig)
    assert guest.answer() == "ready"
    total = guest.status()["pages"]
    low_pages = total - 1024 * MIB // PAGE_SIZE
    assert guest.ask(f"fill 1 8 {low_pages - 4}") == "filled 8"
    assert guest.ask("verify") == "verified 8 bad 0 first_bad none"
    flip(rig, 3072 * MIB)
    assert guest.ask("verify") == f"verified 8 bad 1 first_bad {1 << 32:#x}", "offsets count on across the hole"
    assert guest.ask(f"fill 2 8 {total - 8}") == "filled 8"
    flip(rig, 4096 * MIB - 1)
    assert guest.ask("verify") == f"verified 8 bad 1 first_bad {(5 << 30) - 8:#x}"


def test_time_goes_on_while_it_works(new_rig: NewRig, guest_folder: Path) -> None:
    rig = new_rig(MachineConfig(32 * MIB, kernel=guest_folder / "pages", icount=True, icount_sleep=False)).boot()
    guest = PagesGuest(rig)
    assert guest.answer() == "ready"
    before = guest.status()["ticks"]
    # Two instructions for eight bytes: over 7 million for 30 MiB, 60 ms of virtual time.
    guest.ask("fill 1")
    assert guest.status()["ticks"] >= before + 6


def test_answers_and_ticks_are_whole_lines(rig: Rig, guest: PagesGuest) -> None:
    guest.ask("fill 1")
    while rig.line.sent.count(b"tick") < 2:
        guest.ask("status")
    line = rb"(ready|filled \d+|tick \d+|status ticks \d+ pages \d+ filled \d+ seed \d+ generation \d+)\n"
    assert re.fullmatch(rb"(%s)*" % line, rig.line.sent)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("verify", "nothing is filled"),
        ("rewrite 1 1", "nothing is filled"),
        ("fill", "wrong number of arguments"),
        ("rewrite 1", "wrong number of arguments"),
        ("quit", "wrong number of arguments"),
        ("fill x", "not a number, or too many of them"),
        ("fill -1", "not a number, or too many of them"),
        ("fill 0x", "not a number, or too many of them"),
        ("fill 12a", "not a number, or too many of them"),
        ("fill 1 2 3 4", "not a number, or too many of them"),
        (f"fill 1 {PAGES + 1}", "no such pages"),
        ("fill 1 0", "no such pages"),
        (f"fill 1 1 {PAGES}", "no such pages"),
        ("fill 1 18446744073709551615 1", "no such pages"),
        ("fil 1", "unknown command"),
        ("filled 1", "unknown command"),
        ("Fill 1", "unknown command"),
        ("x" * 1000, "unknown command"),
    ],
)
def test_what_is_no_command_is_an_error_and_changes_nothing(guest: PagesGuest, command: str, answer: str) -> None:
    assert guest.ask(command) == f"error {answer}"
    assert guest.status()["filled"] == 0


def test_several_lines_at_once_and_every_line_end(rig: Rig, guest: PagesGuest) -> None:
    rig.line.type(b"\r\n\nfill 1 5\rverify \r\n  \nstatus\n")
    answers = [guest.answer() for _ in range(4)]
    assert answers[:3] == ["filled 5", "verified 5 bad 0 first_bad none", "error unknown command"]
    assert answers[3].startswith("status ")


@pytest.mark.parametrize(("code", "status"), [(0, 1), (3, 7), (0x2A, 0x55)])
def test_quit_ends_the_machine(rig: Rig, guest: PagesGuest, code: int, status: int) -> None:
    rig.line.type(f"quit {code}\n".encode())
    ending = rig.ended()
    assert (ending.run_state, ending.exit_code) == ("shutdown", status)


def stop_at_tick(rig: Rig, ticks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the guest run until its timer has ticked so often, exactly: with icount the same place in every run."""
    pit, left, reached = rig.machine.board.pit, ticks, threading.Event()
    advance = pit.advance

    def counting(now_ns: int) -> None:
        nonlocal left
        advance(now_ns)
        left -= 1
        if left == 0:
            rig.machine.request_stop()
            reached.set()

    with monkeypatch.context() as patch:
        patch.setattr(pit, "advance", counting)
        rig.machine.start()
        assert reached.wait(60)
        assert rig.machine.stop(60)


@pytest.mark.parametrize("command", ["fill 77", "verify", "rewrite 1000000 3"])
def test_saved_in_the_middle_of_a_command_it_ends_elsewhere(
    new_rig: NewRig, guest_folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Saved at several places of the same command, each time the resumed guest finishes it and finds nothing wrong."""
    config = MachineConfig(12 * MIB, kernel=guest_folder / "pages", icount=True, icount_sleep=False)
    source = new_rig(config).boot()
    guest = PagesGuest(source)
    assert guest.answer() == "ready"
    filled = guest.ask("fill 7").split()[1]
    source.machine.stop()
    source.line.type(command.encode() + b"\n")
    ended_elsewhere = 0
    for ticks in (1, 1, 2):
        stop_at_tick(source, ticks, monkeypatch)
        destination = new_rig(config).load(source.save())
        destination.machine.start()
        resumed = PagesGuest(destination)
        if not guest.answered():
            ended_elsewhere += 1
            assert resumed.answer() in (
                f"filled {filled}",
                f"verified {filled} bad 0 first_bad none",
                f"rewrote {filled}",
            )
        assert resumed.ask("verify") == f"verified {filled} bad 0 first_bad none"
        # A guest that idles in counted time without sleep is a busy one.
        destination.machine.stop()
    assert ended_elsewhere >= 2


def test_an_exception_nobody_expected_ends_the_guest_with_its_place(new_rig: NewRig, tmp_path: Path) -> None:
    source = (
        '.set TICKS_PER_LINE, 10\n.include "pc.inc"\n.section .text\nstart: lea rsp, [rip + stack_top]\ncall pc_init\n'
    )
    (tmp_path / "bad.S").write_text(source + "mov rax, 0x123456789000\nmov rax, [rax]\n")
    subprocess.run(["as", "--64", "-I", SOURCES, "-o", tmp_path / "bad.o", tmp_path / "bad.S"], check=True)
    subprocess.run(["ld", "-T", SOURCES / "guest.ld", "-o", tmp_path / "bad", tmp_path / "bad.o"], check=True)
    entry = parse_elf((tmp_path / "bad").read_bytes()).entry
    rig = new_rig(MachineConfig(2 * MIB, kernel=tmp_path / "bad")).boot()
    assert rig.ended().exit_code == 0x7F << 1 & 0xFF | 1
    match = re.fullmatch(rb"panic: exception 14 error 0x0 at rip 0x([0-9a-f]+) cr2 0x123456789000\n", rig.line.sent)
    assert match is not None, rig.line.sent
    assert entry < int(match[1], 16) < entry + 64
