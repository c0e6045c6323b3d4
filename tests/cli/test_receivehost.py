"""What a destination checks before anything is begun, and the command line that it makes for its emulator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bench.memorygroup import memory_group
from lazymem.cli import handoverend, receivehost
from lazymem.cli.handoverreport import as_text
from lazymem.cli.receivehost import GONE_CODE, ReceiveHost, Wanted, command_line
from lazymem.errors import EnvironmentRefusedError, LazymemError, MountError, ServerRefusedError, StoreError, UsageError
from lazymem.fs import hostmemory, mountinfo
from lazymem.handover.arriving import boot_id
from lazymem.handover.messages import VERSION, Offer
from tests.support import skips

OURS: dict[str, Any] = {"name": "lazymem-vm", "version": "0.1"}
QEMU: dict[str, Any] = {"name": "qemu", "version": "7.2", "machine": "pc-i440fx-7.2", "cpu": "qemu64", "options": []}


def offer(**more: Any) -> Offer:
    fields = {"emulator": OURS, "boot_id": "another host", "ram_path": "/ram", **more}
    return Offer(VERSION, "00" * 16, fields.pop("ram_bytes", 64 << 20), running=True, **fields)


def wanted(tmp_path: Path, *words: str, more: tuple[str, ...] = ()) -> Wanted:
    return Wanted(tmp_path / "mnt", tmp_path / "cache", (), words, more)


@pytest.mark.parametrize(
    ("free", "available", "error", "reason"),
    [
        (1 << 20, 1 << 40, StoreError, "has room for 1 MiB"),
        (1 << 40, 1 << 20, EnvironmentRefusedError, "1 MiB to spare"),
    ],
)
def test_too_little_disk_or_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, available: int, error: type[LazymemError], reason: str
) -> None:
    monkeypatch.setattr(receivehost, "_free_bytes", lambda _: free)
    monkeypatch.setattr(receivehost, "_available_bytes", lambda: available)
    host = ReceiveHost(tmp_path / "mnt", tmp_path)
    with pytest.raises(error, match=reason):
        host.check(offer(), wanted(tmp_path))
    host.check(offer(), replace(wanted(tmp_path), force=True))


_SPARE = """
from lazymem.cli import receivehost
print(int(receivehost._available_bytes()))
"""


@pytest.mark.needs_root("a control group")
def test_what_its_control_group_gives_counts_too(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory_group("lazymem-test") as group:
        if isinstance(group, str):
            skips.stood_in(request.node, f"a number, for what a memory control group gives: {group}")
            monkeypatch.setattr(hostmemory, "room_bytes", lambda _: 4096.0)
            assert receivehost._available_bytes() == 4096
            return
        group.limit(96 << 20)
        command = group.command(sys.executable, "-c", _SPARE)
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert int(said) < 96 << 20


def test_the_same_file_on_the_same_host(tmp_path: Path) -> None:
    host = ReceiveHost(tmp_path, tmp_path)
    with pytest.raises(MountError, match="on this very host"):
        host.check(offer(boot_id=boot_id(), ram_path=str(tmp_path / "ram")), wanted(tmp_path))
    host.check(offer(boot_id="another", ram_path=str(tmp_path / "ram"), ram_bytes=4096), wanted(tmp_path))


def test_our_own_engine(tmp_path: Path) -> None:
    words, options = command_line(offer(), wanted(tmp_path, "-serial", "none"), Path("/mnt/pc.ram"), tmp_path)
    assert words[:6] == ["-m", "65536K", "--pcram-file", "/mnt/pc.ram", "-incoming", "defer"]
    assert (options.engine, options.ram_bytes, options.qmp) == ("unicorn", 64 << 20, tmp_path / "qmp")
    assert options.start_paused


def test_qemu_gets_a_monitor_of_ours_beside_the_users(tmp_path: Path) -> None:
    """Its monitors serve one client each."""
    asked = wanted(tmp_path, "-qmp", "unix:/user", more=("-no-reboot",))
    words, options = command_line(offer(emulator=QEMU), asked, Path("/mnt/pc.ram"), tmp_path)
    assert (options.engine, options.qmp) == ("qemu", Path("/user"))
    assert words[-3:] == ["-no-reboot", "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    assert '"machine": "pc-i440fx-7.2"' in (tmp_path / "made-by.json").read_text()


@pytest.mark.parametrize("words", [("-incoming", "defer"), ("--pcram-file=x",), ("-mem-file", "a=b"), ("-nonsense",)])
def test_options_that_are_not_the_users(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        command_line(offer(), wanted(tmp_path, *words), Path("/mnt/pc.ram"), tmp_path)


@pytest.mark.parametrize(
    "emulator", [{"name": "qemu"}, {"name": "qemu", "version": 7}, {"name": "qemu", "version": "7", "cpu": 1}]
)
def test_a_source_that_tells_nonsense(tmp_path: Path, emulator: dict[str, Any]) -> None:
    with pytest.raises(ServerRefusedError):
        command_line(offer(emulator=emulator), wanted(tmp_path), Path("/mnt/pc.ram"), tmp_path)


def test_nobody_elses_mount_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever made this command fail: a guest may run from it."""
    mounted = mountinfo.Mount(1, "0:50", str(tmp_path), "fuse.lazymem", "", None)
    ended: list[str] = []

    def end(path: str, *, force: bool) -> None:
        ended.append(path)
        monkeypatch.setattr(mountinfo, "maybe_mount_at", lambda _: None)

    monkeypatch.setattr(receivehost, "end_mount", end)
    for source in ("h:1/snapshot", "h:1", f"h:1/{'11' * 16}"):
        found = replace(mounted, source=source)
        monkeypatch.setattr(mountinfo, "maybe_mount_at", lambda _, found=found: found)
        ReceiveHost(tmp_path, tmp_path).clean_up()
        host = ReceiveHost(tmp_path, tmp_path)
        host.adopt("00" * 16, 0, "", Path(), Path())
        host.clean_up()
    assert ended == []
    monkeypatch.setattr(mountinfo, "maybe_mount_at", lambda _: replace(mounted, source=f"unix:x:/{'00' * 16}"))
    host.clean_up()
    assert ended == [str(tmp_path)]


@pytest.mark.parametrize("folder", ["", ".", "/", "/tmp", "lazymem-x", "{0}/lazymem-", "{0}/lazymem-ab"])
def test_nobody_elses_emulator_is_ended(tmp_path: Path, folder: str) -> None:
    """A journal without an emulator names no other hand-over's: its guest may be anybody's."""
    sockets = Path(folder.format(tmp_path))
    stranger = f"unix:{tmp_path}/lazymem-abc/qmp"
    with _named(stranger):
        host = ReceiveHost(tmp_path, tmp_path)
        host.adopt("00" * 16, 0, "", Path(), sockets)
        assert host.pid == 0


def test_ones_own_emulator_is_found_by_its_folder(tmp_path: Path) -> None:
    sockets = tmp_path / "lazymem-abc"
    with _named(f"unix:{sockets}/qmp") as process:
        host = ReceiveHost(tmp_path, tmp_path)
        host.adopt("00" * 16, 0, "", Path(), sockets)
        assert (host.pid, host.maybe_exit_code()) == (process.pid, None)


@pytest.mark.parametrize(("noted", "code"), [("143\n", 143), ("0\n", 0), ("", GONE_CODE), (None, GONE_CODE)])
def test_what_an_earlier_commands_emulator_ended_with(tmp_path: Path, noted: str | None, code: int) -> None:
    """It has noted it, unless it was killed."""
    sockets = tmp_path / "lazymem-abc"
    sockets.mkdir()
    host = ReceiveHost(tmp_path, tmp_path)
    with _named(f"unix:{sockets}/qmp") as process:
        host.adopt("00" * 16, 0, "", Path(), sockets)
        if noted is not None:
            (sockets / "exit-code").write_text(noted)
        assert host.maybe_exit_code() is None  # it is not gone yet
        process.kill()
        process.wait()
    assert host.maybe_exit_code() == code
    assert host.is_end_unknown is (code == GONE_CODE)


@contextmanager
def _named(word: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose command line is as a lazymem-vm's with that word."""
    command = [sys.executable, "-c", "print(flush=True); input()", "lazymem.cli.vm", "-qmp", word]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def test_what_came_ahead_is_told_in_a_line() -> None:
    """Of which much is still right. A mount's next daemon does not know what the one before used."""
    report = {"warmed_bytes": 3 << 20, "candidates_used": 512, "candidates_refused": 256, "mount_restarts": 0}
    assert as_text(report) == "came ahead of it  3.0 MiB: 2.0 MiB of RAM were right, 1.0 MiB had changed since"
    assert as_text(report | {"mount_restarts": 1}) == "came ahead of it  3.0 MiB"
    assert as_text(report | {"warmed_bytes": 0}) == ""


def test_every_figure_is_one_of_the_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"wire_received_bytes", "demand_faults", "demand_wait_p50_seconds", "demand_wait_p99_seconds"}
    known |= {"pages_demanded", "pages_prefetched", "pages_written", "pages_total"}
    known |= {"candidates_used", "candidates_refused"}
    status: dict[str, Any] = dict.fromkeys(known, 1)
    monkeypatch.setattr(receivehost, "read_status", lambda _: status | {"survival": {"restarts": 1}})
    assert set(ReceiveHost(tmp_path, tmp_path).figures().values()) == {1}
    monkeypatch.setattr(receivehost, "read_status", lambda _: status | {"survival": None})
    figures = ReceiveHost(tmp_path, tmp_path).figures()
    assert figures["mount_restarts"] == 0
    assert "daemon" not in as_text(figures)
    assert "since the mount's daemon" in as_text(figures | {"mount_restarts": 1})


@pytest.mark.parametrize(
    ("told", "more", "expected"),
    [
        ("vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", (), "vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"),
        ("vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", ("-device", "vmgenid,guid=auto"), "vmgenid,guid=auto"),
        ("vmgenid,guid=auto,file=/x", (), None),
    ],
)
def test_a_moved_guest_keeps_its_generation_id(
    tmp_path: Path, told: str, more: tuple[str, ...], expected: str | None
) -> None:
    """What the other side says is taken only if it is an id; the user's own word holds."""
    found = offer(emulator=QEMU | {"options": ["-device", told]})
    words, _ = command_line(found, wanted(tmp_path, more=more), Path("/mnt/pc.ram"), tmp_path)
    given = [word for word in words if word.startswith("vmgenid")]
    assert given == ([] if expected is None else [expected])


def test_nothing_that_the_other_side_says_does_something_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    handoverend.say("lazymem send", "refused: \x1b]0;title\x07\x9b31m\u202e a\nb é")
    assert capsys.readouterr().err == "lazymem send: refused: ?]0;title??31m? a b é\n"
