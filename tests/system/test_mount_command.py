"""`lazymem-mount` and `lazymem status` as a user types them: paths from where he stands, options, clear refusals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from lazymem.fs import checks, mountinfo
from tests.support.mounts import WAIT_SECONDS, Mounted, Stage, command, wait_until
from tests.support.snapshots import BuiltSnapshot
from tests.support.standinsystemd import StandInSystemd

pytestmark = pytest.mark.system

QUIET = ("--prefetch", "none")

NAMESPACE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
"""A mount namespace to change things in; for a user within a user namespace, where he counts as root."""


def _run(*arguments: object, cwd: Path, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    line = [*before, *command("lazymem.cli.mount", *arguments)]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(line, cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=60)


def _one_line(result: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    assert (result.stdout, result.stderr.count("\n")) == ("", 1), result
    assert result.stderr.startswith("lazymem-mount: ")
    return result.returncode, result.stderr


def test_every_path_is_meant_from_where_the_user_stands(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    """The daemon works in another folder than its user."""
    mounts.serve(snapshot.folder, arguments=("--listen", f"unix:{tmp_path / 'socket'}"))
    (tmp_path / "mnt").mkdir()
    options = ("--cache", "cache", "--state", "state", "--log", "log", *QUIET)
    result = _run("unix:socket:/snap", "mnt", *options, cwd=tmp_path)
    try:
        assert (result.returncode, result.stderr) == (0, "")
        assert (tmp_path / "mnt" / "pc.ram").read_bytes() == snapshot.ram
        assert f"{tmp_path}/mnt is ready" in (tmp_path / "log").read_text()
        assert (tmp_path / "state" / "pc.ram").exists()
        assert len(list((tmp_path / "cache").glob("*/pages"))) == 1
    finally:
        subprocess.run(command("lazymem.cli.umount", tmp_path / "mnt"), capture_output=True, check=False, timeout=60)
    assert mountinfo.maybe_mount_at(str(tmp_path / "mnt")) is None


def test_a_symlink_as_a_mount_point(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "mnt").symlink_to("real")
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    assert mount.path.is_symlink()
    assert (tmp_path / "real" / "pc.ram").read_bytes() == snapshot.ram
    for name in ("mnt", "real"):
        asked = subprocess.run(
            command("lazymem.cli.status", tmp_path / name, "--json"), capture_output=True, check=True
        )
        assert json.loads(asked.stdout)["mountpoint"] == str(tmp_path / "real")
    subprocess.run(command("lazymem.cli.umount", tmp_path / "mnt"), check=True, timeout=60)
    assert mountinfo.maybe_mount_at(str(tmp_path / "real")) is None


def test_a_variable_that_nobody_set_is_no_mount_point(snapshot: BuiltSnapshot, mounts: Stage, tmp_path: Path) -> None:
    """`lazymem-mount ram:7411 "$PLACE"` must not cover the current folder."""
    code, said = _one_line(_run(mounts.serve(snapshot.folder).address, "", cwd=tmp_path))
    assert (code, "no name" in said) == (13, True)
    assert mountinfo.maybe_mount_at(str(tmp_path)) is None


@pytest.mark.parametrize("front", [(), ("-f",)])
def test_a_log_file_that_cannot_be(tmp_path: Path, front: tuple[str, ...]) -> None:
    (tmp_path / "mnt").mkdir()
    code, said = _one_line(_run("127.0.0.1:9", "mnt", "--log", "no/such/log", *front, cwd=tmp_path))
    assert (code, f"cannot write the log file {tmp_path}/no/such/log" in said) == (2, True)


def test_an_old_kernel_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    old = _run("127.0.0.1:9", "mnt", cwd=tmp_path, before=("setarch", "--uname-2.6"))
    code, said = _one_line(old)
    assert (code, "kernel 2.6." in said, "too old" in said) == (3, True, True)


def test_without_the_fuse_device(tmp_path: Path) -> None:
    """In a mount namespace where something else lies over /dev/fuse."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "nothing").touch()
    covered = (*NAMESPACE, "sh", "-ec", f'mount --bind "{tmp_path}/nothing" /dev/fuse; "$@"', "sh")
    code, said = _one_line(_run("127.0.0.1:9", "mnt", cwd=tmp_path, before=covered))
    assert (code, "/dev/fuse is not a device" in said) == (3, True)


def _super_options(mount: Mounted) -> str:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(line for line in lines if line.split()[4] == str(mount.path)).rpartition(" - ")[2]


def test_others_see_it_only_with_allow_other(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """The kernel keeps everybody else out unless the option was given, which fuse.conf may forbid a user."""
    address = mounts.serve(snapshot.folder).address
    own = mounts.mount(address, *QUIET)
    assert "allow_other" not in _super_options(own)
    shared = mounts.mount(address, *QUIET, "-o", "allow_other,noatime", name="shared", check=False)
    if os.geteuid() != 0:
        if shared.result.returncode:
            assert "user_allow_other" in shared.result.stderr
        return
    assert shared.result.returncode == 0, shared.result.stderr
    assert "allow_other" in _super_options(shared)
    # Another user stands in each mount's root already, so that no folder on the way to it keeps him out.
    look = "import os; os.setgid(65534); os.setuid(65534); print(os.listdir('.'))"
    for mount, code in ((own, 1), (shared, 0)):
        try_it = subprocess.run(
            [sys.executable, "-c", look], cwd=mount.path, capture_output=True, text=True, check=False
        )
        assert try_it.returncode == code, try_it
        assert ("PermissionError" if code else "pc.ram") in try_it.stdout + try_it.stderr


def test_a_service_manager_is_told_when_the_mount_answers(
    mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Type=notify: nothing is said and kept when it cannot be mounted; READY=1 only once the RAM can be read."""
    point = tmp_path / "front"
    point.mkdir()
    address = mounts.serve(snapshot.folder).address
    systemd = StandInSystemd(tmp_path, monkeypatch)
    with contextlib.closing(systemd):
        arguments = (point, "--cache", mounts.cache, *QUIET)
        lost = subprocess.run(
            command("lazymem.cli.mount", "-f", "127.0.0.1:9", *arguments), capture_output=True, check=False
        )
        assert lost.returncode == 9
        systemd.look()
        assert (systemd.said, systemd.kept) == ([], {})
        service = subprocess.Popen(
            command("lazymem.cli.mount", "-f", address, *arguments),
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: bool(systemd.look()), "it says something")
            assert systemd.said == ["READY=1"]
            with open(point / "pc.ram", "rb", buffering=0) as file:
                assert file.read(4096) == snapshot.page(0)
            service.terminate()
            assert service.wait(30) == 0
            systemd.look()
            assert systemd.kept == {}
        finally:
            service.kill()
            service.wait()
            subprocess.run(["umount", "-l", point], capture_output=True, check=False)


def test_status_says_all_that_it_should(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    began = time.monotonic()
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    mapped = mount.open_map()
    assert mapped[5 * 4096] == snapshot.ram[5 * 4096]
    mapped[9 * 4096] = 1
    mapped.flush()
    mapped.close()
    asked = subprocess.run(command("lazymem.cli.status", mount.path, "--json"), capture_output=True, check=True)
    status = json.loads(asked.stdout)
    assert status["pid"] == mount.pid
    assert (status["pages_written"], status["pages_in_flight"], status["connected"]) == (1, 0, True)
    assert status["pages_held"] >= 1
    assert status["demand_faults"] >= 2
    assert 0 < status["demand_wait_p50_seconds"] <= status["demand_wait_p99_seconds"]
    # The upper edge of what it was counted in: a fifth more at most.
    assert status["demand_wait_p99_seconds"] < 1.2 * (time.monotonic() - began), "waited since we began"
    assert status["wire_received_bytes"] > 2 * 4096
    assert 0 < status["wire_sent_bytes"] < status["wire_received_bytes"]
    people = subprocess.run(command("lazymem.cli.status", mount.path), capture_output=True, text=True, check=True)
    assert f"(pid {mount.pid})" in people.stdout
    assert "written        1 of 1024 pages" in people.stdout
    assert "connected" in people.stdout


def test_disks_that_the_snapshot_lacks_are_spoken_of_at_each_mount(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """A QEMU that resumes off the mount says nothing, and only a QEMU's guest has disks: so the mount says it."""
    assert snapshot.manifest is not None
    manifest = replace(snapshot.manifest, disks_handled=True)
    (snapshot.folder / "manifest.json").write_bytes(manifest.to_json())
    address = mounts.serve(snapshot.folder).address
    for _ in range(2):
        mount = mounts.mount(address, *QUIET)
        assert "does not cover the guest's writable disks" in mount.result.stderr
        assert mount.result.stderr.count("\n") == (1 if checks.maybe_no_resend() is None else 2)  # of that, too
        assert "does not cover the guest's writable disks" in mount.log.read_text()
        mount.unmount()


def test_nobody_of_a_mount_leaves_a_core(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """It would have pages in it. Also whom the daemon starts."""
    daemon = mounts.mount(mounts.serve(snapshot.folder).address).pid
    started = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    assert started
    for pid in (daemon, *started):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the filling process ends when all is here
            assert re.search(r"^Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)


def test_a_command_without_standard_streams_mounts_and_says_so(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    point = mounts.folder / "mnt"
    point.mkdir()
    words = command("lazymem.cli.mount", mounts.serve(snapshot.folder).address, point, "--cache", mounts.cache)
    closed = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *words]
    try:
        assert subprocess.run(closed, timeout=WAIT_SECONDS, check=False).returncode == 0
        assert (point / "pc.ram").read_bytes() == snapshot.ram
    finally:
        subprocess.run(["umount", point], check=True)
