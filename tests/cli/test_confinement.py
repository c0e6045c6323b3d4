"""A filling process that somebody took over tries what root may; the real one's rights: `system/test_mount_fill.py`."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazymem.cli import confinement
from lazymem.cli.confinement import DAEMONS, bound_daemon, confine_filler
from lazymem.cli.landlock import landlock_version
from lazymem.settings import MountSettings, parse_server
from tests.support.processstatus import capabilities_of, status_of
from tests.support.skips import LANDLOCK


def settings(server: str = "127.0.0.1:1") -> MountSettings:
    return MountSettings(servers=(parse_server(server),), mountpoint=Path("/mnt"), cache_dir=Path("/nowhere"))


def in_child(work: Callable[[], object]) -> Any:
    """What `work` returns, in a forked process."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            os.write(write_end, json.dumps(work()).encode())
        except Exception:  # noqa: BLE001  # told, and then the parent has nothing
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said, "see its traceback"
    return json.loads(said)


def error_of(work: Callable[[], object]) -> int:
    try:
        work()
    except OSError as error:
        return error.errno or 0
    return 0


def executed() -> dict[str, str]:
    """The status of a program that this process executes."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write_end, 1)
        try:
            os.execv("/bin/cat", ["cat", "/proc/self/status"])
        finally:
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        lines = pipe.read().splitlines()
    os.waitpid(child, 0)
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def system_call(name: str, *arguments: object) -> int:
    """Its errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if getattr(libc, name)(*arguments) else 0


def test_it_has_no_capability_and_gets_none_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not by asking for it, nor by a program: also where there is no Landlock, which lets it execute none."""
    monkeypatch.setattr(confinement, "shut_out_of_files", lambda: False)

    def work() -> list[object]:
        confine_filler(settings())
        all_of_it = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 4, 0, 0)
        asked = system_call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), all_of_it)
        mounted = system_call("mount", b"none", os.fsencode(tmp_path), b"tmpfs", 0, None)
        program = executed()
        mine = status_of(os.getpid())
        return [
            asked,
            mounted,
            [capabilities_of({**each, "CapBnd": "0"}) for each in (mine, program)],
            [each["NoNewPrivs"] for each in (mine, program)],
            int(mine["CapBnd"], 16),
        ]

    before = status_of(os.getpid())
    asked, mounted, have, no_new, bound = in_child(work)
    assert (asked, mounted) == (errno.EPERM, errno.EPERM)
    assert have == [0, 0]
    assert no_new == ["1", "1"]
    if int(before["CapEff"], 16) >> 8 & 1:  # CAP_SETPCAP
        assert bound == 0


needs_landlock = pytest.mark.skipif(not landlock_version(), reason=f"{LANDLOCK}: root stays its files' owner")


@needs_landlock
def test_it_changes_and_executes_no_file_but_writes_what_it_has_open(tmp_path: Path) -> None:
    """Root's files are its own, also without a capability: Landlock keeps it from them."""
    (tmp_path / "open").touch()
    (tmp_path / "other").write_text("as it was")

    def work() -> object:
        with (tmp_path / "open").open("wb", buffering=0) as file:
            confine_filler(settings())
            file.write(b"a page")
            os.posix_fallocate(file.fileno(), 0, 4096)
            other = tmp_path / "other"
            return [
                other.read_text(),
                error_of(lambda: other.open("ab")),
                error_of(lambda: os.truncate(other, 0)),
                error_of(lambda: (tmp_path / "new").touch()),
                error_of(lambda: os.symlink("/", tmp_path / "new")),
                error_of(other.unlink),
                error_of(lambda: os.rename(other, tmp_path / "new")),
                error_of(lambda: os.execv("/bin/true", ["true"])),
            ]

    found = in_child(work)
    assert isinstance(found, list)
    assert found[0] == "as it was"
    assert set(found[1:]) <= {errno.EACCES, errno.EXDEV}
    assert (tmp_path / "open").read_bytes().startswith(b"a page")


@needs_landlock
def test_where_the_kernel_can_it_signals_nobody() -> None:
    def work() -> int:
        confine_filler(settings())
        return error_of(lambda: os.kill(os.getppid(), signal.SIGCONT))

    assert in_child(work) == (errno.EPERM if landlock_version() >= 6 else 0)


def test_another_users_socket_needs_one_capability_and_an_own_one_none(tmp_path: Path) -> None:
    """Its mode shuts out all but its owner, root too."""
    own = tmp_path / "own"
    own.touch()

    def has(server: str) -> int:
        def work() -> int:
            confine_filler(settings(server))
            return int(status_of(os.getpid())["CapEff"], 16)

        found = in_child(work)
        assert isinstance(found, int)
        return found

    assert has(f"unix:{own}") == 0
    assert has(f"unix:{tmp_path}/not-there-yet") == int(status_of(os.getpid())["CapEff"], 16) & 2


def test_roots_daemon_keeps_what_the_unit_names() -> None:
    def work() -> list[int]:
        bound_daemon()
        status = status_of(os.getpid())
        return [int(status["CapEff"], 16), int(status["CapBnd"], 16)]

    before = status_of(os.getpid())
    allowed = sum(1 << capability for capability in DAEMONS)
    effective, bound = in_child(work)
    assert effective == int(before["CapEff"], 16) & (allowed if os.geteuid() == 0 else -1)
    if os.geteuid() == 0 and int(before["CapEff"], 16) >> 8 & 1:
        assert bound == int(before["CapBnd"], 16) & allowed


def test_it_is_what_the_unit_bounds_a_daemon_to() -> None:
    unit = Path(__file__).resolve().parents[2] / "deploy" / "lazymem-mount@.service"
    (line,) = (line for line in unit.read_text().splitlines() if line.startswith("CapabilityBoundingSet="))
    named = set(line.partition("=")[2].split())
    assert {f"CAP_{capability.name}" for capability in DAEMONS} - {"CAP_SETPCAP"} == named - {"CAP_SETPCAP"}
