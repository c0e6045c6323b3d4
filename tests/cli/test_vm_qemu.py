"""lazymem-vm --engine qemu without a guest to speak of: refusals, each in one line, and what becomes of the child."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazymem.cli.vm import main
from lazymem.errors import (
    BusyError,
    EnvironmentRefusedError,
    IdentityError,
    LazymemError,
    MonitorError,
    RamFileError,
    SaveStreamError,
    SnapshotError,
    UsageError,
)
from lazymem.snapshot.manifest import Block, Emulator, Manifest, VmState, vmstate_digest
from lazymem.vm import qemukvm
from tests.support.fakeqemu import FakeQemu
from tests.support.vmprocess import WAIT_SECONDS, wait_until

RAM_BYTES = 16 << 20
STATE = b"QEVM and more"


@pytest.fixture(autouse=True)
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe has tests of its own."""
    monkeypatch.setattr(qemukvm, "why_not", lambda: "no KVM in tests")


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram,1"
    path.touch()
    os.truncate(path, RAM_BYTES)
    return path


@pytest.fixture
def fake(tmp_path: Path) -> FakeQemu:
    return FakeQemu(tmp_path)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A folder with RAM, a state and a manifest that says how QEMU was started."""
    folder = tmp_path / "snap"
    folder.mkdir()
    (folder / "pc.ram").touch()
    os.truncate(folder / "pc.ram", RAM_BYTES)
    (folder / "vmstate").write_bytes(STATE)
    write_manifest(folder, Emulator("qemu", "9.9.0", "pc-i440fx-9.9", "qemu64", ("-nodefaults", "-m", "16M")))
    return folder


def write_manifest(folder: Path, made_by: Emulator) -> None:
    manifest = Manifest(
        emulator=made_by,
        blocks=(Block("pc.ram", "pc.ram", RAM_BYTES),),
        ram_id="00" * 16,
        ram_root="00" * 32,
        vmstate=VmState("vmstate", len(STATE), vmstate_digest(STATE)),
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())


def resume(folder: Path) -> list[str]:
    return ["--pcram-file", f"{folder}/pc.ram,share=off", "-incoming", f"file:{folder}/vmstate"]


Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line in this process, which has to be refused with that class's exit code; its last line."""

    def run(error: type[LazymemError], *arguments: object) -> str:
        code = main(["--engine", "qemu", "-m", "16", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert (code, out) == (error.exit_code, ""), err
        assert all(line.startswith("lazymem-vm: ") for line in err.splitlines())
        return err.splitlines()[-1]

    return run


class TestRefusals:
    def test_no_qemu(self, refused: Refused, ram: Path) -> None:
        assert "no program" in refused(
            EnvironmentRefusedError, "--qemu", "/no/qemu", "--pcram-file", ram, "-kernel", "k"
        )

    def test_a_qemu_that_cannot_leave_ram_out(self, refused: Refused, ram: Path, tmp_path: Path) -> None:
        fake = FakeQemu(tmp_path, "incapable")
        said = refused(EnvironmentRefusedError, "--qemu", fake.program, "--pcram-file", ram, "-kernel", "k")
        assert "x-ignore-shared" in said
        assert "does not accept that value" in said

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ([], "nothing to run"),
            (["-kernel", "k"], "name it with --pcram-file"),
            (["-kernel", "k", "--", "-incoming", "tcp:0:1"], "say -incoming before the --"),
            (["-kernel", "k", "--", "-daemonize"], "stays this command's child"),
            (["-incoming", "defer", "--pcram-file", "x"], "name one with -qmp"),
        ],
    )
    def test_command_lines(self, refused: Refused, words: list[str], reason: str) -> None:
        assert reason in refused(UsageError, *words)

    @pytest.mark.parametrize("words", [["--print"], ["--qemu", "q"], ["--"], ["--", "-device", "x"]])
    def test_qemus_options_without_it(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["-kernel", "k", *words]) == UsageError.exit_code
        assert "say --engine qemu" in capsys.readouterr().err

    def test_ram_files(self, refused: Refused, ram: Path, fake: FakeQemu) -> None:
        run = ("--qemu", fake.program, "-kernel", "k")
        assert "named twice" in refused(RamFileError, *run, "--pcram-file", ram, "--mem-file", f"pc.ram={ram}")
        assert "no RAM block pc.bios" in refused(RamFileError, *run, "--mem-file", f"pc.bios={ram}")
        assert "cannot open" in refused(RamFileError, *run, "--pcram-file", f"{ram}-none")
        os.mkfifo(f"{ram}.fifo")
        for no_file in (ram.parent, f"{ram}.fifo"):
            said = refused(RamFileError, *run, "--pcram-file", no_file)
            assert f"cannot open {no_file} for RAM block pc.ram: not a regular file" in said
        os.truncate(ram, 4096)
        assert "needs exactly 16777216" in refused(RamFileError, *run, "--pcram-file", ram)
        assert ram.stat().st_size == 4096
        assert fake.words is None
        assert not os.path.exists(f"{ram}-none")

    def test_a_ram_file_in_use(self, refused: Refused, ram: Path, fake: FakeQemu) -> None:
        with ram.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            run = ("--qemu", fake.program, "-kernel", "k", "--pcram-file")
            assert "in use by another guest" in refused(BusyError, *run, ram)
            assert main(["--engine", "qemu", "-m", "16", *map(str, run), f"{ram},share=off"]) == 0

    def test_a_snapshots_own_ram(self, refused: Refused, snapshot: Path, fake: FakeQemu) -> None:
        said = refused(RamFileError, "--qemu", fake.program, "-kernel", "k", "--pcram-file", snapshot / "pc.ram")
        assert "would destroy the snapshot" in said
        assert fake.words is None

    def test_states(self, refused: Refused, snapshot: Path, fake: FakeQemu, tmp_path: Path) -> None:
        run = ("--qemu", fake.program, "--pcram-file", f"{snapshot}/pc.ram,share=off", "-incoming")
        assert "No such file" in refused(MonitorError, *run, "file:/nowhere")
        (tmp_path / "none").write_bytes(b"")
        assert "no saved state of QEMU's" in refused(SaveStreamError, *run, f"file:{tmp_path}/none")
        (tmp_path / "other").write_bytes(b"QEVM of another")
        assert "not that of the snapshot" in refused(IdentityError, *run, f"file:{tmp_path}/other")
        later = (snapshot / "manifest.json").stat().st_mtime_ns + 10**9
        os.utime(snapshot / "pc.ram", ns=(later, later))  # as if written since, and there are no digests to say no
        assert "cannot read the snapshot" in refused(SnapshotError, *run, f"file:{snapshot}/vmstate")
        assert fake.words is None

    def test_machines(self, refused: Refused, snapshot: Path, fake: FakeQemu, tmp_path: Path) -> None:
        run = ["--qemu", fake.program, *resume(snapshot)]
        assert "no machine type toaster" in refused(UsageError, *run, "--", "-machine", "toaster")
        assert "made with -cpu qemu64, not -cpu max" in refused(UsageError, *run, "--", "-cpu", "max")
        write_manifest(snapshot, Emulator("qemu", "10.1.0", "pc-i440fx-10.1", "qemu64"))
        assert "QEMU 10.1 brought that" in refused(EnvironmentRefusedError, *run)
        assert "not -machine pc-i440fx-9.9" in refused(UsageError, *run, "--", "-machine", "pc")
        write_manifest(snapshot, Emulator("lazymem-vm", "0.1", "lazymem-pc-0.1"))
        assert "made by lazymem-vm" in refused(IdentityError, *run)
        assert fake.words is None

    def test_a_private_file_that_an_older_qemu_would_open_for_writing(
        self, refused: Refused, ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = FakeQemu(tmp_path, version="QEMU emulator version 7.2.0")
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        said = refused(RamFileError, "--qemu", fake.program, "-kernel", "k", "--pcram-file", f"{ram},share=off")
        assert "8.2.0 and newer only read it" in said


class TestPrint:
    def test_the_whole_line_for_a_shell(
        self, snapshot: Path, fake: FakeQemu, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--qemu", str(fake.program), *resume(snapshot), "-S", "-serial", "stdio", "--print"]
        assert main(["--engine", "qemu", "-m", "16", *words, "--", "-name", "a guest's"]) == 0
        memory = f"memory-backend-file,id=pc.ram,size={RAM_BYTES},mem-path={snapshot}/pc.ram"
        expected = [
            *(str(fake.program), "-no-user-config", "-nodefaults", "-display", "none", "-accel", "tcg"),
            *("-machine", "pc-i440fx-9.9,memory-backend=pc.ram,mem-merge=off,dump-guest-core=off", "-m", "16M"),
            *("-object", f"{memory},share=off,prealloc=off,readonly=on,rom=off", "-cpu", "qemu64"),
            *("-serial", "stdio", "-incoming", "defer", "-S", "-name", "a guest's"),
        ]
        out, err = capsys.readouterr()
        assert out == shlex.join(expected) + "\n"
        assert err == ""
        assert fake.words is None

    def test_a_new_guest_gets_a_versioned_machine(
        self, ram: Path, fake: FakeQemu, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--qemu", str(fake.program), "--pcram-file", str(ram), "-kernel", "k", "--print"]
        assert main(["--engine", "qemu", "-m", "16", *words]) == 0
        line = shlex.split(capsys.readouterr().out)
        assert line[line.index("-machine") + 1].startswith("pc-i440fx-9.9,")
        assert "-nodefaults" in line
        assert f"mem-path={ram}".replace(",", ",,") in line[line.index("-object") + 1]

    @pytest.mark.parametrize(
        ("made_with", "maybe_reason", "accel", "said"),
        [
            (None, None, "kvm", "a probe guest ran"),
            (None, "no KVM in tests", "tcg", "(no KVM in tests)"),
            ("kvm", None, "kvm", "a probe guest ran"),
            ("kvm", "no KVM in tests", "tcg", "the snapshot was made with kvm, whose state may not load"),
            ("tcg", None, "tcg", "as the snapshot was made"),
        ],
    )
    def test_kvm_where_a_guest_runs_under_it(
        self,
        snapshot: Path,
        fake: FakeQemu,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        made_with: str | None,
        maybe_reason: str | None,
        accel: str,
        said: str,
    ) -> None:
        monkeypatch.setattr(qemukvm, "why_not", lambda: maybe_reason)
        options = () if made_with is None else ("-accel", made_with, "-m", "16M")
        write_manifest(snapshot, Emulator("qemu", "9.9.0", "pc-i440fx-9.9", "qemu64", options))
        words = ["--engine", "qemu", "-m", "16", "--qemu", str(fake.program), *resume(snapshot)]
        assert main([*words, "--print"]) == 0
        line = shlex.split(capsys.readouterr().out)
        assert line[line.index("-accel") + 1] == accel
        FakeQemu(tmp_path, "refuses")  # the same program, which ends at once
        main(words)
        assert said in capsys.readouterr().err

    def test_it_is_what_runs(self, snapshot: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        """But for the monitor of our own, on a socket that only a child has."""
        fake = FakeQemu(tmp_path, "refuses")
        words = ["--engine", "qemu", "-m", "16", "--qemu", str(fake.program), *resume(snapshot), "--serial", "none"]
        more = ["--", "-name", "a guest's", "-device", "virtio-rng-pci"]
        assert main([*words, "--print", *more]) == 0
        printed = shlex.split(capfd.readouterr().out)
        assert fake.words is None
        assert main([*words, *more]) == 1
        assert fake.words is not None
        assert fake.words[:3:2] == ["-chardev", "-mon"]
        assert [str(fake.program), *fake.words[4:]] == printed


class TestChild:
    def test_what_follows_the_dashes_arrives_as_it_is(
        self, ram: Path, fake: FakeQemu, capfd: pytest.CaptureFixture[str]
    ) -> None:
        more = ["-device", "x,y=a b", "--", "", "-m", "3", "--pcram-file", "$HOME"]
        words = ["--engine", "qemu", "--qemu", str(fake.program), "-m", "16", "--pcram-file", str(ram)]
        assert main([*words, "--", *more]) == 0
        assert fake.words is not None
        assert fake.words[-len(more) :] == more
        assert "tcg (no KVM in tests)" in capfd.readouterr().err

    @pytest.mark.parametrize(("mode", "code"), [("0", 0), ("7", 7)])
    def test_its_exit_status_is_ours(self, ram: Path, tmp_path: Path, mode: str, code: int) -> None:
        fake = FakeQemu(tmp_path, mode)
        words = ["--engine", "qemu", "--qemu", str(fake.program), "-m", "16", "--pcram-file", str(ram), "-kernel", "k"]
        assert main(words) == code

    def test_options_that_it_refuses_it_says_itself(
        self, ram: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        fake = FakeQemu(tmp_path, "refuses")
        words = ["--engine", "qemu", "--qemu", str(fake.program), "-m", "16", "--pcram-file", str(ram), "-kernel", "k"]
        assert main(words) == 1
        said = capfd.readouterr().err
        assert "fake: no such option" in said
        assert "QEMU ended with status 1 before its guest could run" in said

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signals_go_on_to_it(self, running: Callable[[], subprocess.Popen[str]], number: signal.Signals) -> None:
        """The stand-in ends by whatever it gets, and so do we, with the same number."""
        process = running()
        process.send_signal(number)
        assert process.wait(WAIT_SECONDS) == 128 + number

    def test_the_ram_file_is_locked_as_long_as_it_runs(
        self, running: Callable[[], subprocess.Popen[str]], ram: Path
    ) -> None:
        process = running()
        with ram.open("rb") as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            process.terminate()
            process.wait(WAIT_SECONDS)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def test_ready_is_said_to_the_service_manager(self, ram: Path, fake: FakeQemu, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(WAIT_SECONDS)
            words = ["--qemu", str(fake.program), "-m", "16", "--pcram-file", str(ram), "-kernel", "k"]
            subprocess.run(
                [sys.executable, "-m", "lazymem.cli.vm", "--engine", "qemu", *words],
                env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
                check=True,
                stderr=subprocess.DEVNULL,
                timeout=WAIT_SECONDS,
            )
            assert b"READY=1" in manager.recv(4096)


def _hear_hangups() -> None:
    """Whoever runs the tests may do so by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def running(ram: Path, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the command with a stand-in that stays until it is ended."""
    fake = FakeQemu(tmp_path, "waits")
    started: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        words = ["--engine", "qemu", "--qemu", str(fake.program), "-m", "16", "--pcram-file", str(ram), "-kernel", "k"]
        process = subprocess.Popen(
            [sys.executable, "-m", "lazymem.cli.vm", *words],
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=_hear_hangups,
        )
        started.append(process)
        wait_until(lambda: fake.ready.exists() or process.poll() is not None, "the stand-in to be asked for all")
        return process

    try:
        yield begin
    finally:
        for process in started:
            process.kill()
            process.wait()
