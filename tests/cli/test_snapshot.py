"""`lazymem snapshot` against a scripted monitor: what it makes and refuses, and that failing costs the guest nothing.

The same on a real QEMU is in tests/system/.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lazymem.cli import snapshot
from lazymem.digests import sums_digest
from lazymem.errors import EnvironmentRefusedError, MonitorError, RamFileError, SnapshotError
from lazymem.snapshot.manifest import parse
from lazymem.snapshot.writer import write_digests
from lazymem.vm import taking
from lazymem.vm.qmpclient import QmpClient
from tests.support.fakeemulator import VMSTATE, Behaviour, FakeEmulator, fake_emulator
from tests.support.vmprocess import WAIT_SECONDS

SIZE = 4 << 20


@pytest.fixture
def behaviour(tmp_path: Path) -> Iterator[Behaviour]:
    """A guest of 4 MiB whose RAM file is in a folder of its own; sockets where paths are short."""
    (tmp_path / "vm").mkdir()
    ram = tmp_path / "vm" / "guest.ram"
    with ram.open("wb") as file:
        file.seek(1 << 20)
        file.write(os.urandom(100_000))
        file.truncate(SIZE)
    with tempfile.TemporaryDirectory() as sockets:
        yield Behaviour(f"{sockets}/qmp", str(ram), SIZE)


def run(fake: FakeEmulator, target: Path, *options: str) -> int:
    return snapshot.main([str(fake.qmp), str(target), *options])


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "snap" in path.name]


def check_whole(folder: Path, tmp_path: Path) -> bytes:
    """The snapshot is what its manifest says; returns the RAM."""
    manifest = parse((folder / "manifest.json").read_bytes())
    names = {"manifest.json", "pc.ram", "pc.ram.digests", "pc.ram.sums", "vmstate"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "vmstate").read_bytes() == VMSTATE
    assert manifest.ram.size == SIZE == (folder / "pc.ram").stat().st_size
    again = tmp_path / f"again-{os.urandom(4).hex()}"
    assert write_digests(folder / "pc.ram", SIZE, again) == (manifest.ram_root, manifest.ram_sums)
    assert sums_digest((folder / "pc.ram.sums").read_bytes()).hex() == manifest.ram_sums
    assert again.read_bytes() == (folder / "pc.ram.digests").read_bytes()
    return (folder / "pc.ram").read_bytes()


def test_resume_leaves_the_guest_running_and_the_snapshot_alone(
    behaviour: Behaviour, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_emulator(behaviour, tmp_path) as fake:
        began = time.monotonic()
        assert run(fake, tmp_path / "snap 'x\"", "--resume", "--json") == 0
        took = time.monotonic() - began
        result = json.loads(capsys.readouterr().out)
        before = check_whole(tmp_path / "snap 'x\"", tmp_path)
        assert fake.runs()
        assert fake.counter() > int.from_bytes(before[:8], "little")
        assert (tmp_path / "snap 'x\"" / "pc.ram").read_bytes() == before
        assert before[8:] == fake.ram.read_bytes()[8:]
    assert 0 < result["pause_seconds"] < took, "a part of the whole"
    assert result["resumed"] is True
    assert result["vmstate_bytes"] == len(VMSTATE)
    assert Path(result["directory"]) == tmp_path / "snap 'x\""
    assert leftovers(tmp_path) == ["snap 'x\""]


def test_capability_is_put_back(behaviour: Behaviour, tmp_path: Path) -> None:
    with fake_emulator(behaviour, tmp_path) as fake:
        assert run(fake, tmp_path / "snap", "--resume") == 0
        assert fake.commands.count("migrate-set-capabilities") == 2


def test_without_resume_the_file_moves_and_the_emulator_ends(behaviour: Behaviour, tmp_path: Path) -> None:
    with fake_emulator(behaviour, tmp_path) as fake:
        inode = fake.ram.stat().st_ino
        assert run(fake, tmp_path / "snap") == 0
        assert fake.wait(WAIT_SECONDS) == 0
    check_whole(tmp_path / "snap", tmp_path)
    assert (tmp_path / "snap" / "pc.ram").stat().st_ino == inode
    assert not Path(behaviour.ram).exists()


def test_without_resume_a_file_with_a_second_name_is_copied(behaviour: Behaviour, tmp_path: Path) -> None:
    os.link(behaviour.ram, tmp_path / "vm" / "second")
    with fake_emulator(behaviour, tmp_path) as fake:
        assert run(fake, tmp_path / "snap") == 0
        assert fake.wait(WAIT_SECONDS) == 0
    check_whole(tmp_path / "snap", tmp_path)
    assert (tmp_path / "snap" / "pc.ram").stat().st_ino != Path(behaviour.ram).stat().st_ino


def test_an_emulator_that_does_not_end_is_copied_from(
    behaviour: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking, "_EXIT_SECONDS", 0.01)
    with fake_emulator(replace(behaviour, answers={"quit": {}}), tmp_path) as fake:
        assert run(fake, tmp_path / "snap") == 0
        check_whole(tmp_path / "snap", tmp_path)
        assert fake.ram.exists()


@pytest.mark.parametrize("options", [["--resume"], []])
@pytest.mark.parametrize("how", ["briefly", "for good"])
def test_a_guest_that_somebody_else_let_go_on_is_no_snapshot(
    behaviour: Behaviour, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], how: str
) -> None:
    """Its RAM would be newer than its device state, and every digest right."""
    with fake_emulator(replace(behaviour, resumed_by_another=how), tmp_path) as fake:
        assert run(fake, tmp_path / "snap", *options) == MonitorError.exit_code
        assert "somebody let the guest go on" in capsys.readouterr().err
        assert fake.runs()
        assert "quit" not in fake.commands
    assert not leftovers(tmp_path)


def test_a_save_of_somebody_else_is_left_alone(behaviour: Behaviour, tmp_path: Path) -> None:
    """The emulator refuses ours since another one began in the meantime: that one is not ours to cancel."""
    refuses = replace(behaviour, errors={"migrate": "There's a migration process in progress"})
    with fake_emulator(refuses, tmp_path) as fake:
        assert run(fake, tmp_path / "snap", "--resume") == MonitorError.exit_code
        assert not {"migrate_cancel", "cont"} & set(fake.commands)
    assert not leftovers(tmp_path)


def test_a_paused_guest_stays_paused(behaviour: Behaviour, tmp_path: Path) -> None:
    with fake_emulator(replace(behaviour, status="paused"), tmp_path) as fake:
        assert run(fake, tmp_path / "snap", "--resume") == 0
        assert "cont" not in fake.commands
    assert parse((tmp_path / "snap" / "manifest.json").read_bytes()).pause_seconds is None


def test_manifest_says_how_it_was_made(behaviour: Behaviour, tmp_path: Path) -> None:
    disk = {"device": "ide0", "inserted": {"ro": False}}
    with fake_emulator(replace(behaviour, answers={"query-block": [disk]}), tmp_path) as fake:
        assert run(fake, tmp_path / "snap", "--resume", "--disks-handled") == 0
    manifest = parse((tmp_path / "snap" / "manifest.json").read_bytes())
    assert (manifest.emulator.name, manifest.emulator.version) == ("qemu", "9.1.2")
    assert manifest.emulator.machine == "fake-1.0"
    assert manifest.disks_handled
    assert manifest.created.endswith("+00:00")


REFUSALS: list[tuple[dict[str, Any], str, int]] = [
    ({"answers": {"query-block": [{"device": "ide0", "inserted": {"ro": False}}]}}, "ide0", SnapshotError.exit_code),
    ({"answers": {"query-memdev": []}}, "not a file", RamFileError.exit_code),
    ({"answers": {"query-memdev": [{"id": "a"}, {"id": "pc.ram"}]}}, "a, pc.ram", RamFileError.exit_code),
    ({"answers": {"query-status": {"status": "inmigrate"}}}, "inmigrate", MonitorError.exit_code),
    ({"answers": {"query-status": {"status": "guest-panicked"}}}, "panicked", MonitorError.exit_code),
    ({"answers": {"query-migrate": {"status": "active"}}}, "being migrated", MonitorError.exit_code),
    (
        {"answers": {"query-migrate-capabilities": [{"capability": "multifd", "state": True}]}},
        "multifd",
        MonitorError.exit_code,
    ),
    ({"answers": {"query-migrate-capabilities": []}}, "x-ignore-shared", EnvironmentRefusedError.exit_code),
    ({"properties": {"share": False}}, "share=off", RamFileError.exit_code),
    ({"properties": {"mem-path": None}}, "no mem-path", RamFileError.exit_code),
    ({"properties": {"mem-path": "/"}}, "unnamed file in the folder", RamFileError.exit_code),
    ({"properties": {"mem-path": "/no/such"}}, "No such file", RamFileError.exit_code),
    (
        {"properties": {"mem-path": os.path.realpath("/proc/self/exe")}},
        "bytes, the guest's RAM|not the file",
        RamFileError.exit_code,
    ),
    ({"properties": {"offset": 4096}}, "offset", RamFileError.exit_code),
]


@pytest.mark.parametrize(("change", "reason", "code"), REFUSALS)
def test_refused_before_the_guest_notices(
    behaviour: Behaviour,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    reason: str,
    code: int,
) -> None:
    with fake_emulator(replace(behaviour, **change), tmp_path) as fake:
        assert run(fake, tmp_path / "snap") == code
        assert not {"migrate", "migrate-set-capabilities", "stop", "cont", "quit"} & set(fake.commands)
        assert fake.runs()
    error = capsys.readouterr().err
    assert any(part in error for part in reason.split("|"))
    assert error.count("\n") == 1
    assert not leftovers(tmp_path)


def test_guest_directly_on_a_snapshots_own_ram_is_refused(
    behaviour: Behaviour, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vm" / "manifest.json").write_text("{}")
    with fake_emulator(behaviour, tmp_path) as fake:
        assert run(fake, tmp_path / "snap", "--resume") == RamFileError.exit_code
        assert "directly on the RAM of the snapshot" in capsys.readouterr().err
        assert fake.runs()
    assert not leftovers(tmp_path)


def test_a_ram_file_that_was_replaced_is_refused(
    behaviour: Behaviour, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_emulator(behaviour, tmp_path) as fake:
        fake.ram.rename(tmp_path / "vm" / "mapped")
        fake.ram.write_bytes(bytes(SIZE))
        assert run(fake, tmp_path / "snap", "--resume") == RamFileError.exit_code
        assert "not the file that the guest maps" in capsys.readouterr().err


def test_existing_folder_is_refused_untouched(behaviour: Behaviour, tmp_path: Path) -> None:
    (tmp_path / "snap").mkdir()
    with fake_emulator(behaviour, tmp_path) as fake:
        assert run(fake, tmp_path / "snap") == SnapshotError.exit_code
        assert fake.commands == []
    assert not any((tmp_path / "snap").iterdir())


@pytest.mark.parametrize("options", [["--resume"], []])
def test_every_failing_command_leaves_guest_and_disk_as_they_were(
    behaviour: Behaviour, tmp_path: Path, options: list[str]
) -> None:
    """The Nth monitor command fails, then the N+1st, until the snapshot succeeds."""
    for number in range(1, 60):
        target = tmp_path / f"snap{number}"
        with fake_emulator(replace(behaviour, fail_at=number), tmp_path) as fake:
            code = run(fake, target, *options)
            name = fake.commands[number - 1] if len(fake.commands) >= number else None
            if name is None:
                assert code == 0
                check_whole(target, tmp_path)
                return
            if code:
                assert not leftovers(tmp_path) or name == "quit", name
                assert name == "cont" or fake.runs(), name
            else:
                # Only questions that not every emulator can answer, and what comes when the snapshot is whole.
                assert name in ("qom-get", "migrate-set-capabilities", "query-status"), name
                check_whole(target, tmp_path)
                target.rename(tmp_path / f"made{number}")
                return_ram(tmp_path / f"made{number}", behaviour)
    pytest.fail("it never succeeded")


def return_ram(made: Path, behaviour: Behaviour) -> None:
    """A snapshot that took the RAM file: the next emulator needs one."""
    if not Path(behaviour.ram).exists():
        (made / "pc.ram").rename(behaviour.ram)


@pytest.mark.parametrize("call", ["copy_file_range", "lseek", "pread", "fsync", "fchmod", "chmod", "rename", "open"])
@pytest.mark.parametrize("options", [["--resume"], []])
def test_every_failing_disk_call_lets_the_guest_go_on(
    behaviour: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, options: list[str]
) -> None:
    """The Nth call of the operating system fails, then the N+1st, until the snapshot succeeds."""
    real = getattr(os, call)
    os.link(behaviour.ram, tmp_path / "vm" / "second")  # a copy in both cases; a moved file ends the guest
    for number in range(1, 60):
        calls = 0

        def failing(*arguments: Any, _number: int = number, **more: Any) -> Any:
            nonlocal calls
            calls += threading.current_thread() is threading.main_thread()
            if calls == _number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **more)

        target = tmp_path / f"snap{number}"
        with fake_emulator(behaviour, tmp_path) as fake:
            with monkeypatch.context() as patch:
                patch.setattr(os, call, failing)
                code = run(fake, target, *options)
            if code == 0:
                check_whole(target, tmp_path)
                assert calls < number
                return
            assert fake.runs()
            assert os.listdir(fake.qmp.parent) == ["qmp"]
            if target.exists():  # the sync of its parent failed: it is whole, and nothing is lost
                check_whole(target, tmp_path)
                target.rename(tmp_path / f"whole{number}")
            assert not leftovers(tmp_path)
    pytest.fail("it never succeeded")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_guest_go_on(behaviour: Behaviour, tmp_path: Path, number: int) -> None:
    with fake_emulator(replace(behaviour, stall=True), tmp_path) as fake:
        command = [sys.executable, "-m", "lazymem.cli.snapshot", str(fake.qmp), str(tmp_path / "snap")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                fake.wait_command("migrate")
                process.send_signal(number)
                _, error = process.communicate(timeout=WAIT_SECONDS)
            finally:
                process.kill()
        assert process.returncode == 130
        assert "interrupted" in error
        assert "Traceback" not in error
        assert fake.commands[-3:] != ["quit"]
        assert "migrate_cancel" in fake.commands
        assert fake.runs()
        with QmpClient(fake.qmp) as qmp:  # which is refused while a save is under way
            assert qmp.command("query-migrate-capabilities") == [{"capability": "x-ignore-shared", "state": False}]
    assert not leftovers(tmp_path)
    assert os.listdir(Path(behaviour.qmp).parent) == []


DIES = """
import os, sys
from lazymem.cli import snapshot
from lazymem.vm import ramways, savestate, taking
where, name = sys.argv[1].rsplit(".", 1)
setattr(eval(where), name, lambda *_: os.kill(os.getpid(), 9))
snapshot.main(sys.argv[2:])
"""

ALONE = """
import os, sys
from lazymem.cli import snapshot
fork = os.fork
def alone():
    pid = fork()
    if pid:
        os.kill(pid, 9)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid
os.fork = alone
sys.exit(snapshot.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("at", "options"),
    [
        ("taking.save_device_state", []),
        ("savestate.wait_migration_over", []),
        ("taking.hashed", []),
        ("ramways.FileCopy.copy", ["--resume"]),
    ],
)
def test_a_killed_one_lets_the_guest_go_on(behaviour: Behaviour, tmp_path: Path, at: str, options: list[str]) -> None:
    """Another process takes back what it had changed, whatever it was at."""
    with fake_emulator(behaviour, tmp_path) as fake:
        command = [sys.executable, "-c", DIES, at, str(fake.qmp), str(tmp_path / "snap"), *options]
        killed = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=WAIT_SECONDS, check=False)
        # All of it, also what that process has said, whose stderr is the same.
        assert (killed.returncode, killed.stderr.splitlines()[-1:]) == (
            -signal.SIGKILL,
            ["lazymem snapshot: it was killed; no snapshot was made, the guest goes on"],
        )
        assert fake.runs()
        assert "quit" not in fake.commands
        with QmpClient(fake.qmp) as qmp:
            assert qmp.command("query-migrate-capabilities") == [{"capability": "x-ignore-shared", "state": False}]
        assert run(fake, tmp_path / "snap", "--resume") == 0
        assert leftovers(tmp_path) == ["snap"]


def test_a_killed_one_whose_emulator_has_gone_says_what_is_left(behaviour: Behaviour, tmp_path: Path) -> None:
    with fake_emulator(behaviour, tmp_path) as fake:
        dies = DIES.replace("lambda *_: ", f"lambda *_: os.kill({fake.pid}, 9) or ")
        command = [sys.executable, "-c", dies, "taking.save_device_state", str(fake.qmp), str(tmp_path / "snap")]
        killed = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=WAIT_SECONDS, check=False)
        assert killed.stderr.startswith(f"lazymem snapshot: it was killed, and the guest at {fake.qmp} may stand (")
        assert killed.stderr.count("\n") == 1


def test_one_whose_second_process_is_killed_goes_on(behaviour: Behaviour, tmp_path: Path) -> None:
    with fake_emulator(behaviour, tmp_path) as fake:
        command = [sys.executable, "-c", ALONE, str(fake.qmp), str(tmp_path / "snap"), "--resume"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        check_whole(tmp_path / "snap", tmp_path)


def test_no_monitor_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert snapshot.main([str(tmp_path / "none"), str(tmp_path / "snap")]) == MonitorError.exit_code
    assert "cannot reach the monitor" in capsys.readouterr().err
    assert not leftovers(tmp_path)


def test_something_else_than_a_monitor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen(1)

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            assert snapshot.main([f"{folder}/s", str(tmp_path / "snap")]) == MonitorError.exit_code
        finally:
            thread.join()
    assert "not a monitor" in capsys.readouterr().err
