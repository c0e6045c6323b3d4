"""lazymem-vm as a process: a guest saved here goes on there; every refusal is one line and its own exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lazymem.cli.vm import main
from lazymem.cli.vm_options import VALUED, make_parser, monitor_path, parse_command_line, ram_bytes
from lazymem.errors import (
    BusyError,
    IdentityError,
    LazymemError,
    MonitorError,
    RamFileError,
    SaveStreamError,
    SnapshotError,
    UsageError,
)
from lazymem.snapshot.manifest import Block, Emulator, Manifest, VmState, vmstate_digest
from lazymem.vm.guests import build_guest
from lazymem.vm.ram import MemFile
from lazymem.vm.uri import FileUri
from tests.support.streamreader import read_stream
from tests.support.vmprocess import WAIT_SECONDS, Start, counts_on, wait_until

RAM_MIB = 16


@pytest.fixture(scope="module")
def heartbeat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_guest("heartbeat", tmp_path_factory.mktemp("guests"))


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, RAM_MIB << 20)
    return path


class TestSavedHereResumedThere:
    def test_over_a_file_with_a_copy_of_the_ram(self, start: Start, heartbeat: Path, ram: Path, tmp_path: Path) -> None:
        first = start("--pcram-file", ram, "-kernel", heartbeat)
        first.wait_ticks(3)
        first.save(f"file:{tmp_path}/vmstate")
        before = first.ticks()
        copy = tmp_path / "copy"
        copy.write_bytes(ram.read_bytes())
        stream = read_stream((tmp_path / "vmstate").read_bytes())
        assert stream.blocks["pc.ram"] == RAM_MIB << 20
        assert stream.pages_of("pc.ram") == 0
        second = start("--pcram-file", copy, "-incoming", f"file:{tmp_path}/vmstate")
        second.wait_ticks(3)
        counts_on(before, second.ticks())
        assert first.ticks() == before
        second.quit()
        first.quit()

    def test_saved_again_where_it_was_resumed(self, start: Start, heartbeat: Path, ram: Path, tmp_path: Path) -> None:
        guest = start("-pcram-file", ram, "-kernel", heartbeat)
        numbers: list[int] = []
        for turn in range(3):
            guest.wait_ticks(2)
            guest.save(f"file:{tmp_path}/vmstate{turn}")
            numbers += guest.ticks()
            guest.quit()
            guest = start("-pcram-file", ram, "-incoming", f"file:{tmp_path}/vmstate{turn}")
        guest.wait_ticks(2)
        counts_on(numbers, guest.ticks())
        guest.quit()

    def test_without_a_ram_file_over_a_socket(self, start: Start, heartbeat: Path, tmp_path: Path) -> None:
        first = start("-kernel", heartbeat)
        first.wait_ticks(2)
        second = start("-incoming", f"unix:{tmp_path}/stream")
        wait_until((tmp_path / "stream").exists, "the second process to listen")
        first.save(f"unix:{tmp_path}/stream")
        second.wait_ticks(2)
        counts_on(first.ticks(), second.ticks())
        second.quit()

    def test_a_stopped_guest_stands_there_until_cont(
        self, start: Start, heartbeat: Path, ram: Path, tmp_path: Path
    ) -> None:
        first = start("--pcram-file", ram, "-kernel", heartbeat)
        first.wait_ticks(2)
        with first.qmp() as qmp:
            qmp.command("stop")
        first.save(f"file:{tmp_path}/vmstate")
        before = first.ticks()
        first.quit()
        second = start("--pcram-file", ram, "-incoming", "defer")
        with second.qmp() as qmp:
            assert qmp.command("query-status")["status"] == "inmigrate"
            qmp.command("migrate-incoming", uri=f"file:{tmp_path}/vmstate")
            assert qmp.wait_status(lambda status: status != "inmigrate") == "paused"
            assert second.ticks() == []
            qmp.command("cont")
        second.wait_ticks(2)
        counts_on(before, second.ticks())
        second.quit()

    def test_many_from_one_image(self, start: Start, heartbeat: Path, ram: Path, tmp_path: Path) -> None:
        first = start("--pcram-file", ram, "-kernel", heartbeat)
        first.wait_ticks(2)
        first.save(f"file:{tmp_path}/vmstate")
        before = first.ticks()
        first.quit()
        image = ram.read_bytes()
        clones = [start("--pcram-file", f"{ram},share=off", "-incoming", f"file:{tmp_path}/vmstate") for _ in range(2)]
        for clone in clones:
            clone.wait_ticks(2)
            counts_on(before, clone.ticks())
        for clone in clones:
            clone.quit()
        assert ram.read_bytes() == image


class TestStartAndEnd:
    def test_paused_until_cont(self, start: Start, heartbeat: Path) -> None:
        guest = start("-kernel", heartbeat, "-S")
        with guest.qmp() as qmp:
            assert qmp.command("query-status")["status"] == "prelaunch"
            qmp.command("cont")
        guest.wait_ticks(1)
        guest.quit()
        assert not guest.monitor.exists()

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_ends_it_and_syncs_the_ram(
        self, start: Start, heartbeat: Path, ram: Path, number: int, code: int
    ) -> None:
        guest = start("--pcram-file", ram, "-kernel", heartbeat)
        guest.wait_ticks(2)
        with guest.qmp() as qmp:
            guest.process.send_signal(number)
            with contextlib.suppress(MonitorError):
                while True:
                    qmp.command("query-status")
            events = {event.name: event.data for event in qmp.take_events()}
        assert guest.end() == (code, "")
        assert events.get("SHUTDOWN", {"reason": "host-signal"})["reason"] == "host-signal"
        assert not guest.monitor.exists()
        assert ram.read_bytes().strip(b"\0")
        assert ram.stat().st_size == RAM_MIB << 20

    def test_a_signal_ends_it_while_its_state_does_not_come(self, start: Start, tmp_path: Path) -> None:
        """As of a file on a mount whose server is away."""
        os.mkfifo(tmp_path / "state")
        guest = start("-incoming", f"file:{tmp_path}/state")
        with guest.qmp() as qmp:
            assert qmp.command("query-status")["status"] == "inmigrate"
        guest.process.send_signal(signal.SIGTERM)
        code, said = guest.end()
        assert (code, "still waited for a file" in said) == (143, True), said
        assert not guest.monitor.exists()

    def test_quit_ends_it_while_its_state_goes_nowhere(self, start: Start, heartbeat: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "state")
        guest = start("-kernel", heartbeat)
        with guest.qmp() as qmp:
            qmp.command("migrate", uri=f"file:{tmp_path}/state")
            assert qmp.command("query-migrate")["status"] == "setup"
            qmp.command("quit")
        assert guest.end()[0] == 0

    def test_the_terminal_shows_the_guest_and_ctrl_c_ends_it(self, heartbeat: Path) -> None:
        command = [sys.executable, "-m", "lazymem.cli.vm", "-m", "16", "-kernel", str(heartbeat), "-serial", "stdio"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                line = next(line for line in process.stdout if "tick" in line)
                process.send_signal(signal.SIGINT)
                process.stdout.read()
                assert (process.wait(WAIT_SECONDS), line[:5]) == (130, "tick ")
            finally:
                process.kill()

    def test_a_crashed_guest_ends_with_its_state(self, start: Start, tmp_path: Path) -> None:
        kernel = tmp_path / "crash"
        kernel.write_bytes(elf(b"\x48\xb8" + struct.pack("<Q", 0x1122334455667788) + b"\x0f\x0b"))  # mov rax, ud2
        guest = start("-kernel", kernel)
        code, said = guest.end()
        assert code == 16
        assert said.startswith("lazymem-vm: ")
        assert "1122334455667788" in said
        assert "Traceback" not in said

    def test_a_guest_that_ends_itself_says_how(self, start: Start, tmp_path: Path) -> None:
        kernel = tmp_path / "exit"
        kernel.write_bytes(elf(b"\xb8\x05\x00\x00\x00\x66\xba\xf4\x00\xee\xf4"))  # mov eax, 5; mov dx, 0xf4; out; hlt
        assert start("-kernel", kernel).end() == (11, "")

    def test_icount_runs_alike(self, start: Start, heartbeat: Path) -> None:
        guests = [start("-kernel", heartbeat, "--icount") for _ in range(2)]
        for guest in guests:
            guest.wait_ticks(3)
        texts = [guest.serial.read_bytes() for guest in guests]
        shorter = min(len(text) for text in texts)
        assert texts[0][:shorter] == texts[1][:shorter]


def elf(code: bytes) -> bytes:
    """An ELF64 kernel of one segment at 1 MiB whose first byte is the entry."""
    at = 0x100000
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, at, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 120, at, at, len(code), len(code), 0x1000) + code


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line in this process, which has to be refused with that class's exit code; what it said."""

    def run(error: type[LazymemError], *arguments: object) -> str:
        code = main(["-m", str(RAM_MIB), *(str(argument) for argument in arguments)])
        said = capsys.readouterr()
        assert (code, said.out) == (error.exit_code, "")
        assert said.err.startswith("lazymem-vm: ")
        assert said.err.count("\n") == 1
        return said.err

    return run


class TestRefusals:
    """One line that begins with the command's name, the class's exit code, and nothing changed."""

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ([], "nothing to run"),
            (["-kernel"], "-kernel needs a value"),
            (["-kernel", "k", "-m", "12Q"], "-m 12Q: not a size"),
            (["-kernel", "k", "-nonsense"], "unrecognized arguments: --nonsense"),
            (["-kernel", "k", "-incomin", "x"], "unrecognized arguments"),
            (["-kernel", "/nowhere/k"], "/nowhere/k"),
            (["-kernel", "/dev/null", "-m", "0"], "RAM of 0 bytes"),
            (["-incoming", "exec:cat"], "no place for a save stream"),
            (["-incoming", "defer"], "name one with -qmp"),
            (["-kernel", "k", "-qmp", "tcp:1"], "-qmp takes unix:PATH"),
            (["-kernel", "k", "-qmp", "unix:p,wait=on"], "'wait=on' is not offered"),
            (["-kernel", "k", "-serial", "pty"], "-serial takes"),
        ],
    )
    def test_command_lines(self, refused: Refused, words: list[str], reason: str) -> None:
        assert reason in refused(UsageError, *words)

    def test_ram_files(self, refused: Refused, ram: Path, tmp_path: Path, heartbeat: Path) -> None:
        kernel = ("-kernel", heartbeat)
        assert "named twice" in refused(RamFileError, *kernel, "--pcram-file", ram, "--mem-file", f"pc.ram={ram}")
        assert "no RAM block x" in refused(RamFileError, *kernel, "--mem-file", f"x={ram}")
        assert "cannot open" in refused(RamFileError, *kernel, "--pcram-file", tmp_path / "none")
        assert "share=maybe" in refused(RamFileError, *kernel, "--pcram-file", f"{ram},share=maybe")
        os.truncate(ram, 4096)
        assert "has 4096 bytes" in refused(RamFileError, *kernel, "--pcram-file", ram)
        assert ram.read_bytes() == bytes(4096)

    def test_a_ram_file_in_use(self, refused: Refused, start: Start, ram: Path, heartbeat: Path) -> None:
        start("--pcram-file", ram, "-kernel", heartbeat).wait_ticks(1)
        assert "in use by another guest" in refused(BusyError, "--pcram-file", ram, "-kernel", heartbeat)

    def test_a_monitor_that_cannot_be(self, refused: Refused, heartbeat: Path) -> None:
        text = refused(MonitorError, "-kernel", heartbeat, "-qmp", "unix:/nowhere/at/all")
        assert "cannot listen for the monitor" in text

    def test_a_kernel_that_is_none(self, refused: Refused, ram: Path) -> None:
        assert refused(UsageError, "-kernel", ram)


@pytest.fixture
def saved(start: Start, heartbeat: Path, ram: Path, tmp_path: Path) -> Path:
    """A snapshot folder of a heartbeat guest, without digests: their reading has tests of its own."""
    guest = start("--pcram-file", ram, "-kernel", heartbeat)
    guest.wait_ticks(1)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    guest.save(f"file:{folder}/vmstate")
    guest.quit()
    ram.rename(folder / "pc.ram")
    data = (folder / "vmstate").read_bytes()
    manifest = Manifest(
        emulator=Emulator("lazymem-vm", "0"),
        blocks=(Block("pc.ram", "pc.ram", RAM_MIB << 20),),
        ram_id="00" * 16,
        ram_root="00" * 32,
        vmstate=VmState("vmstate", len(data), vmstate_digest(data)),
        disks_handled=True,
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return folder


class TestIncomingRefusals:
    """Rule 6, and broken streams: the guest is not started and the RAM file stays as it was."""

    def test_the_right_state_is_taken_and_disks_are_spoken_of(self, start: Start, saved: Path) -> None:
        guest = start("--pcram-file", f"{saved}/pc.ram,share=off", "-incoming", f"file:{saved}/vmstate")
        guest.wait_ticks(2)
        guest.process.send_signal(signal.SIGTERM)
        code, said = guest.end()
        assert code == 143
        assert "does not cover the guest's writable disks" in said

    def test_states_that_are_not_its(self, refused: Refused, saved: Path, tmp_path: Path) -> None:
        before = (saved / "pc.ram").read_bytes()
        data = (saved / "vmstate").read_bytes()
        private = ("--pcram-file", f"{saved}/pc.ram,share=off")
        shared = ("--pcram-file", f"{saved}/pc.ram", "-incoming", f"file:{saved}/vmstate")
        assert "would destroy" in refused(RamFileError, *shared)
        assert "No such file" in refused(MonitorError, *private, "-incoming", "file:/nowhere")
        (tmp_path / "cut").write_bytes(data[:-100])
        assert "section " in refused(SaveStreamError, *private, "-incoming", f"file:{tmp_path}/cut")
        (saved / "manifest.json").write_text(json.dumps({"format": "lazymem-snapshot"}))
        text = refused(SnapshotError, *private, "-incoming", f"file:{saved}/vmstate")
        assert "manifest.json" in text
        assert (saved / "pc.ram").read_bytes() == before

    def test_another_snapshots_state(
        self, refused: Refused, start: Start, saved: Path, heartbeat: Path, tmp_path: Path
    ) -> None:
        other = start("-kernel", heartbeat, "--pcram-file", f"{saved}/pc.ram,share=off")
        other.wait_ticks(1)
        other.save(f"file:{tmp_path}/other")
        other.quit()
        text = refused(
            IdentityError, "--pcram-file", f"{saved}/pc.ram,share=off", "-incoming", f"file:{tmp_path}/other"
        )
        assert "not that of the snapshot" in text

    def test_another_size_of_ram(self, refused: Refused, saved: Path) -> None:
        text = refused(SaveStreamError, "-m", "8", "-incoming", f"file:{saved}/vmstate")
        assert "RAM block pc.ram has 16777216 bytes there and 8388608 here" in text


class TestCommandLine:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("64", 64 << 20),
            ("1.5G", 3 << 29),
            ("4096k", 4 << 20),
            ("2t", 2 << 40),
            ("size=8M", 8 << 20),
            ("8192B", 8192),
        ],
    )
    def test_sizes(self, text: str, size: int) -> None:
        assert ram_bytes(text) == size

    @pytest.mark.parametrize("text", ["", "M", "-1", "1e9", "0x10", "1MM", "1 M", "1.5B", "9" * 40, "١٢"])
    def test_sizes_that_are_none(self, text: str) -> None:
        with pytest.raises(UsageError):
            ram_bytes(text)

    def test_one_dash_or_two(self) -> None:
        words = ["pcram-file", "/a,b,share=off", "mem-file", "pc.bios=/c", "kernel", "k", "append", "-x --y", "serial"]
        words += ["file:s", "qmp", "unix:q", "incoming", "file:v", "icount"]
        options = [
            parse_command_line(["-m", "8", "-S", *(f"{dash}{word}" if word in NAMES else word for word in words)])
            for dash in ("-", "--")
        ]
        assert options[0] == options[1]
        assert options[0].mem_files == (
            MemFile("pc.ram", Path("/a,b"), share=False),
            MemFile("pc.bios", Path("/c"), share=True),
        )
        assert (options[0].append, options[0].icount, options[0].start_paused) == ("-x --y", True, True)
        assert options[0].incoming is not None
        assert options[0].incoming.uri == FileUri(Path("v"))

    @pytest.mark.parametrize("text", ["unix:p", "unix:p,server=on,wait=off", "unix:p,server,nowait"])
    def test_monitor(self, text: str) -> None:
        assert monitor_path(text) == Path("p")

    def test_options_that_take_a_value(self) -> None:
        taking = {
            option for action in make_parser()._actions if action.nargs is None for option in action.option_strings
        }
        assert taking == VALUED

    def test_help_and_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        assert "examples:" in text
        assert "-incoming file:/mnt/vmstate" in text
        assert main(["-version"]) == 0
        assert capsys.readouterr().out.startswith("lazymem-vm 0.")

    def test_the_man_page_names_every_option(self) -> None:
        page = (Path(__file__).parents[2] / "docs/man/lazymem-vm.1.md").read_text()
        for action in make_parser()._actions:
            assert any(f"**{option}**" in page for option in action.option_strings), action.option_strings
        told = set(re.findall(r"^\*\*--?([a-z-]+)\*\*", page, flags=re.MULTILINE))
        assert told <= {option.lstrip("-") for action in make_parser()._actions for option in action.option_strings}

    def test_the_man_pages_exit_codes_are_the_classes(self) -> None:
        page = (Path(__file__).parents[2] / "docs/man/lazymem-vm.1.md").read_text()
        codes = {int(number) for number in re.findall(r"^\*\*(\d+)\*\*", page, flags=re.MULTILINE)}
        raised = {UsageError, RamFileError, SnapshotError, IdentityError, SaveStreamError, BusyError, MonitorError}
        assert {error.exit_code for error in raised} | {0, 3, 16, 130, 143} <= codes


NAMES = {"pcram-file", "mem-file", "kernel", "append", "serial", "qmp", "incoming", "icount"}
