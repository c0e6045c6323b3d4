"""The main job with our own emulator: saved here, served, mounted, resumed there off the mount; and rule 6 on it."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.cli.main import main as lazymem
from lazymem.errors import IdentityError
from lazymem.vm.guests import build_guest
from lazymem.vm.identity import check_state_belongs
from tests.support.mounts import Mounted, Stage
from tests.support.snapshotguest import stalled
from tests.support.stopping import stop
from tests.support.streamreader import read_stream
from tests.support.vmprocess import WAIT_SECONDS, Process, Start, wait_until

pytestmark = pytest.mark.system

RAM_MIB = 16
QUIET = ("--prefetch", "none")


class Line:
    """The guest's serial line: a command a line, answers and ticks a line."""

    def __init__(self, path: Path) -> None:
        wait_until(path.exists, "the serial line")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT_SECONDS)
        wait_until(lambda: self._socket.connect_ex(str(path)) == 0, "somebody to listen")  # which comes after its name
        self._text = ""

    def send(self, command: str) -> None:
        self._socket.sendall(command.encode() + b"\n")

    def wait(self, pattern: str) -> str:
        """The next line that matches."""
        while True:
            *lines, self._text = self._text.split("\n")
            for at, line in enumerate(lines):
                if re.fullmatch(pattern, line.strip("\r")):
                    self._text = "\n".join([*lines[at + 1 :], self._text])
                    return line.strip("\r")
            data = self._socket.recv(4096)
            assert data, f"the line ended before {pattern}"
            self._text += data.decode()

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def line_of(process: Process, path: Path) -> Iterator[Line]:
    wait_until(lambda: path.exists() or process.process.poll() is not None, "the serial line")
    assert process.process.poll() is None, process.end()
    line = Line(path)
    try:
        yield line
    finally:
        line.close()


def serial(tmp_path: Path, name: str) -> tuple[Path, tuple[str, str]]:
    path = tmp_path / name
    return path, ("-serial", f"unix:{path}")


@pytest.fixture
def saved(start: Start, tmp_path: Path) -> Path:
    """A snapshot of a `pages` guest that has filled its RAM."""
    kernel = build_guest("pages", tmp_path)
    ram = tmp_path / "ram"
    ram.touch()
    os.truncate(ram, RAM_MIB << 20)
    path, option = serial(tmp_path, "first")
    guest = start("--pcram-file", ram, "-kernel", kernel, *option)
    with line_of(guest, path) as line:
        line.wait("ready|tick .*")
        line.send("fill 7")
        line.wait(r"filled \d+")
        assert lazymem(["snapshot", str(guest.monitor), str(tmp_path / "snapshot")]) == 0
    assert guest.end()[0] == 0
    return tmp_path / "snapshot"


def resume(start: Start, mount: Mounted, *arguments: str) -> Process:
    return start("--pcram-file", mount.ram_path, "-incoming", f"file:{mount.path}/vmstate", *arguments)


def test_the_main_job(start: Start, mounts: Stage, saved: Path, tmp_path: Path) -> None:
    assert read_stream((saved / "vmstate").read_bytes()).pages_of("pc.ram") == 0
    image = (saved / "pc.ram").read_bytes()
    mount = mounts.mount(mounts.serve(saved).address, *QUIET)
    path, option = serial(tmp_path, "second")
    guest = resume(start, mount, *option)
    with line_of(guest, path) as line:
        line.wait(r"tick \d+")
        line.send("verify")
        assert re.fullmatch(r"verified \d{4,} bad 0 first_bad none", line.wait("verified .*"))
        line.send("rewrite 50 9")
        line.wait("rewrote 50")
        line.send("verify")
        assert " bad 0 " in line.wait("verified .*")
    guest.quit()
    assert (saved / "pc.ram").read_bytes() == image
    # Rule 6: this RAM was written by that run, so the saved state is no longer its.
    again = start("--pcram-file", mount.ram_path, "-incoming", f"file:{saved}/vmstate")
    code, said = again.end()
    assert (code, "has written" in said) == (IdentityError.exit_code, True), said


def test_ram_of_another_snapshot_is_refused(start: Start, mounts: Stage, saved: Path, tmp_path: Path) -> None:
    mount = mounts.mount(mounts.serve(saved).address, *QUIET)
    path, option = serial(tmp_path, "private")
    clone = start("--pcram-file", f"{saved}/pc.ram,share=off", "-incoming", f"file:{saved}/vmstate", *option)
    with line_of(clone, path) as line:
        line.wait(r"tick \d+")
        clone.save(f"file:{tmp_path}/other")
    clone.quit()
    # It carries all of its RAM, since its file was mapped privately; and it is not that snapshot's state.
    refused = start("--pcram-file", f"{mount.ram_path},share=off", "-incoming", f"file:{tmp_path}/other")
    code, said = refused.end()
    assert (code, "not that of the snapshot" in said) == (IdentityError.exit_code, True), said


def test_pages_that_are_dirty_in_the_kernel_only_count_as_written(mounts: Stage, saved: Path) -> None:
    """A stock QEMU maps the file, and locks nothing: what it wrote is not at the mount before it is written back.

    In this process, since the kernel writes back when a child closes its copies of our descriptors.
    """
    mount = mounts.mount(mounts.serve(saved).address, *QUIET)
    stream = (saved / "vmstate").read_bytes()
    check_state_belongs(mount.ram_path, "pc.ram", stream, pytest.fail)
    with mount.ram_path.open("r+b") as file, mmap.mmap(file.fileno(), RAM_MIB << 20) as ram:
        ram[5 << 12] ^= 1
        with pytest.raises(IdentityError, match="has written 1 pages"):
            check_state_belongs(mount.ram_path, "pc.ram", stream, pytest.fail)


def test_the_monitor_answers_while_the_vcpu_waits_for_a_page(
    start: Start, mounts: Stage, saved: Path, tmp_path: Path
) -> None:
    server = mounts.serve(saved)
    mount = mounts.mount(server.address, *QUIET)
    path, option = serial(tmp_path, "second")
    guest = resume(start, mount, *option)
    with line_of(guest, path) as line, guest.qmp() as qmp, guest.qmp() as other:
        line.wait(r"tick \d+")
        before = qmp.command("query-status")
        with stalled(server):
            line.send("verify")
            wait_until(lambda: mount.status()["fetch"]["in_flight_pages"] > 0, "a page to be waited for")
            for _ in range(50):
                assert other.command("query-status") == before
        assert " bad 0 " in line.wait("verified .*")
        qmp.command("stop")
        assert other.command("query-status")["status"] == "paused"
    guest.quit()


def test_a_signal_ends_it_while_the_vcpu_waits_for_a_page(
    start: Start, mounts: Stage, saved: Path, tmp_path: Path
) -> None:
    server = mounts.serve(saved)
    mount = mounts.mount(server.address, *QUIET)
    path, option = serial(tmp_path, "second")
    guest = resume(start, mount, *option)
    with line_of(guest, path) as line:
        line.wait(r"tick \d+")
        with stalled(server):
            line.send("verify")
            wait_until(lambda: mount.status()["fetch"]["in_flight_pages"] > 0, "a page to be waited for")
            guest.process.send_signal(signal.SIGTERM)
            code, said = guest.end()
    assert (code, "still waited for a page" in said) == (143, True), said


def test_a_signal_ends_an_idle_one_whose_server_is_away(
    start: Start, mounts: Stage, saved: Path, tmp_path: Path
) -> None:
    """Its CPU stands; letting go of its RAM, of which most is not here, waits for nobody."""
    server = mounts.serve(saved)
    mount = mounts.mount(server.address, *QUIET)
    path, option = serial(tmp_path, "second")
    guest = resume(start, mount, *option)
    with line_of(guest, path) as line:
        line.wait(r"tick \d+")
        with stalled(server):
            guest.process.send_signal(signal.SIGTERM)
            code, said = guest.end()
    assert (code, said) == (143, "")


def test_an_end_that_has_to_wait_says_for_what_and_a_second_signal_does_not(
    start: Start, mounts: Stage, saved: Path, tmp_path: Path
) -> None:
    """The mount's daemon stands, so what the guest wrote cannot be stored."""
    mount = mounts.mount(mounts.serve(saved).address, *QUIET)
    path, option = serial(tmp_path, "second")
    guest = resume(start, mount, *option)
    with line_of(guest, path) as line:
        line.wait(r"tick \d+")
        stop(mount.pid)
        try:
            assert guest.process.stderr is not None
            guest.process.send_signal(signal.SIGTERM)
            said = guest.process.stderr.readline()
            assert f"waits for the guest's memory to be stored in {mount.ram_path}" in said
            guest.process.send_signal(signal.SIGTERM)
            assert "left at once, as asked twice" in guest.process.stderr.readline()
        finally:
            os.kill(mount.pid, signal.SIGCONT)
        assert guest.end()[0] == 143  # what the kernel waits for in its name, it has to wait for
    assert (saved / "pc.ram").stat().st_size == RAM_MIB << 20
