"""How a mount begins, ends, and is refused."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lazymem.fs import mountinfo
from tests.support.mounts import Mounted, Stage, command, wait_until
from tests.support.ownnamespace import own_mount_namespace
from tests.support.processtree import is_gone, started_with
from tests.support.snapshots import BuiltSnapshot, make_snapshot

pytestmark = pytest.mark.system

QUIET = ("--prefetch", "none")


def _gone(mount: Mounted) -> bool:
    return mountinfo.maybe_mount_at(str(mount.path)) is None


def _refusal(mounts: Stage, *arguments: object, name: str = "mnt") -> tuple[int, str]:
    mount = mounts.mount(str(arguments[0]), *arguments[1:], name=name, check=False)
    assert mount.result.stdout == ""
    assert mount.result.stderr.count("\n") == 1, mount.result.stderr
    assert _gone(mount)
    return mount.result.returncode, mount.result.stderr


def test_no_server(mounts: Stage) -> None:
    code, text = _refusal(mounts, "127.0.0.1:9")
    assert code == 9
    assert "127.0.0.1:9" in text


def test_no_such_snapshot(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    code, text = _refusal(mounts, mounts.serve(snapshot.folder).address + "/nobody")
    assert code == 10
    assert "nobody" in text


def test_somebody_else_listens_there(mounts: Stage) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        child = os.fork()
        if child == 0:
            peer, _ = listener.accept()
            peer.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n" * 4)
            peer.recv(1)
            os._exit(0)
        code, text = _refusal(mounts, f"127.0.0.1:{port}")
        os.waitpid(child, 0)
    assert code == 8
    assert f"127.0.0.1:{port}" in text


def test_mount_points_that_will_not_do(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    address = mounts.serve(snapshot.folder).address

    def refused(where: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command("lazymem.cli.mount", address, where), capture_output=True, text=True, check=False, timeout=30
        )

    missing = refused(tmp_path / "missing")
    assert (missing.returncode, "create the folder" in missing.stderr) == (13, True)
    (tmp_path / "file").touch()
    assert "not a folder" in refused(tmp_path / "file").stderr
    mount = mounts.mount(address, *QUIET)
    busy = refused(mount.path)
    assert (busy.returncode, "is busy" in busy.stderr) == (13, True)
    assert mount.ram_path.read_bytes() == snapshot.ram


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("-o", "nonsense"), 13, "unknown mount option 'nonsense'"),
        (("-o", "max_read=1"), 13, "unknown mount option"),
        (("--deadline", "-1"), 2, "not a positive"),
        (("--state", "/dev/null/x"), 15, "/dev/null/x"),
        (("--cache", "/dev/null/x"), 15, "/dev/null/x"),
    ],
)
def test_options_that_will_not_do(
    mounts: Stage, snapshot: BuiltSnapshot, arguments: tuple[str, ...], code: int, text: str
) -> None:
    found = _refusal(mounts, mounts.serve(snapshot.folder).address, *arguments)
    assert found[0] == code
    assert text in found[1]


def test_a_state_folder_of_another_snapshot(mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path) -> None:
    other = make_snapshot(tmp_path / "other", pages=1024, seed=8)
    server = mounts.serve(snapshot.folder, other.folder)
    state = ("--state", tmp_path / "state")
    mounts.mount(f"{server.address}/snap", *QUIET, *state).unmount()
    code, text = _refusal(mounts, f"{server.address}/other", *state)
    assert code == 6
    assert "another snapshot" in text


def test_a_snapshot_folder_is_no_state_folder(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    code, text = _refusal(mounts, mounts.serve(snapshot.folder).address, "--state", snapshot.folder)
    assert code == 15
    assert "not a state folder" in text
    assert (snapshot.folder / "pc.ram").read_bytes() == snapshot.ram


def test_a_broken_manifest_is_not_believed(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    manifest = snapshot.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"pc.ram"', '"../pc.ram"'))
    result = subprocess.run(
        command("lazymem_server.app", snapshot.folder, "--listen", "127.0.0.1:0"),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert result.returncode == 5
    assert "outside the snapshot's folder" in result.stderr


def test_a_namespace_that_nobody_else_sees(
    mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    alone = own_mount_namespace(request.node, "slave", "from lazymem.cli.mount import run; run()")
    (tmp_path / "mnt").mkdir()
    address = mounts.serve(snapshot.folder).address
    result = subprocess.run(
        [*alone, address, tmp_path / "mnt"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert result.returncode == 3
    assert "nobody else would see the mount" in result.stderr


def test_sigterm_ends_an_idle_mount(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    os.kill(mount.pid, signal.SIGTERM)
    mount.wait_ended()
    assert _gone(mount)


def test_sigterm_never_kills_a_mapped_guest(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 13: the daemon says who holds the file, serves on, and ends when they go."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET, "--state", mounts.folder / "state")
    mapped = mount.open_map()
    os.kill(mount.pid, signal.SIGTERM)
    wait_until(lambda: f"(pid {os.getpid()}) maps it" in mount.log.read_text(), "the daemon says who")
    assert mapped[:] == snapshot.ram, "pages still come"
    mapped[0:3] = b"end"
    mapped.close()
    mount.wait_ended()
    assert _gone(mount)
    assert (mounts.folder / "state" / "pc.ram").read_bytes()[:3] == b"end"


def test_sigterm_waits_for_a_shell_that_stands_there(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Nothing is released when it leaves, so the unmount is tried again."""
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    shell = subprocess.Popen(["sleep", "60"], cwd=mount.path)
    try:
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: "works in it" in mount.log.read_text(), "the daemon says who")
    finally:
        shell.kill()
        shell.wait()
    mount.wait_ended()
    assert _gone(mount)


def test_umount_of_a_mapped_mount_names_the_holder(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    mapped = mount.open_map()
    umount = command("lazymem.cli.umount", mount.path)
    refused = subprocess.run(umount, capture_output=True, text=True, check=False, timeout=30)
    assert refused.returncode == 14
    assert f"(pid {os.getpid()}) maps it" in refused.stderr
    assert mapped[:] == snapshot.ram
    mapped.close()
    subprocess.run(umount, check=True, timeout=60)
    assert _gone(mount)
    nothing = subprocess.run(umount, capture_output=True, text=True, check=False, timeout=30)
    assert (nothing.returncode, "is not a lazymem mount" in nothing.stderr) == (13, True)


def test_force_aborts(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET)
    holder = os.open(mount.ram_path, os.O_RDONLY)
    subprocess.run(command("lazymem.cli.umount", "--force", mount.path), check=True, timeout=60)
    with pytest.raises(OSError, match=r"not connected|aborted|Input/output"):
        os.pread(holder, 1, 0)
    with contextlib.suppress(OSError):  # its flush cannot be answered any more
        os.close(holder)
    assert _gone(mount)
    wait_until(lambda: is_gone(mount.pid), "the daemon's end: it lets go of the mount a moment before")


def test_our_own_descriptors_never_hold_the_mount(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """Rule 13: a plain umount works while everything is being fetched."""
    big = make_snapshot(mounts.folder / "big", pages=8192, seed=1)
    mount = mounts.mount(mounts.serve(big.folder).address)
    assert (mount.path / "vmstate").read_bytes() == big.vmstate
    mount.unmount()
    assert _gone(mount)


def test_a_mount_right_after_an_unmount(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """The old daemon still has the run's state: the new one waits for it instead of failing."""
    server = mounts.serve(snapshot.folder)
    for round_ in range(3):
        mount = mounts.mount(server.address, *QUIET, "--state", mounts.folder / "state")
        mapped = mount.open_map()
        mapped[round_] = round_ + 1
        mapped.close()
        subprocess.run(["umount", mount.path], check=True, timeout=60)
    last = mounts.mount(server.address, *QUIET, "--state", mounts.folder / "state")
    with open(last.ram_path, "rb") as file:
        assert file.read(3) == bytes([1, 2, 3])


def test_an_unanswerable_request_does_not_keep_the_daemon(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    """The server is gone, a reader that waits for its page is killed, the mount is unmounted: the daemon ends."""
    server = mounts.serve(snapshot.folder)
    mount = mounts.mount(server.address, *QUIET)
    server.kill()
    child = os.fork()
    if child == 0:
        # With the kernel's read-ahead, so that it waits for the page and not for the request: that wait can be killed.
        os.pread(os.open(mount.ram_path, os.O_RDONLY), 1, 0)
        os._exit(0)
    wait_until(lambda: mount.status()["demand_faults"] >= 1, "the reader waits for its page")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    mount.unmount()
    wait_until(lambda: is_gone(mount.pid), "the daemon's end: it lets go of the mount a moment before")


def test_fusermount_ends_it_too(mounts: Stage, snapshot: BuiltSnapshot) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, *QUIET, "--state", mounts.folder / "state")
    mapped = mount.open_map()
    mapped[0:5] = b"dirty"
    mapped.close()
    subprocess.run(["fusermount3", "-u", mount.path], check=True, timeout=30)
    mount.wait_ended()
    assert (mounts.folder / "state" / "pc.ram").read_bytes()[: 1 << 12] == b"dirty" + snapshot.page(0)[5:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_in_front_it_ends_with_ctrl_c_and_with_its_terminal(
    mounts: Stage, snapshot: BuiltSnapshot, tmp_path: Path, number: signal.Signals
) -> None:
    server = mounts.serve(snapshot.folder)
    (tmp_path / "front").mkdir()
    daemon = subprocess.Popen(
        command("lazymem.cli.mount", "-f", server.address, tmp_path / "front", "--cache", mounts.cache),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert daemon.stderr is not None
        assert any("is ready" in line for line in daemon.stderr)  # a user is told of the throttle first
        assert (tmp_path / "front" / "pc.ram").read_bytes() == snapshot.ram
        daemon.send_signal(number)
        assert daemon.wait(30) == 0
        assert "is unmounted" in daemon.stderr.read()
    finally:
        daemon.kill()
        daemon.wait()
        assert daemon.stderr is not None
        daemon.stderr.close()
        subprocess.run(["umount", "-l", tmp_path / "front"], capture_output=True, check=False)
    assert mountinfo.maybe_mount_at(str(tmp_path / "front")) is None


def test_without_root_fusermount_mounts(snapshot: BuiltSnapshot, mounts: Stage) -> None:
    """As an ordinary user: the helper hands the descriptor over, and the missing right is said in the log."""
    server = mounts.serve(snapshot.folder)
    become: list[str] = []
    user = os.geteuid()
    if user == 0:
        user = 65534
        # One capability, so that the user may read this checkout wherever it is; geteuid() is not 0 for the daemon.
        become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        become += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    with tempfile.TemporaryDirectory(prefix="lm-", dir="/tmp") as folder:
        os.chown(folder, user, -1)
        point, log = Path(folder, "mnt"), Path(folder, "log")
        point.mkdir()
        os.chown(point, user, -1)
        environ = {**os.environ, "HOME": folder, "XDG_CACHE_HOME": f"{folder}/cache", "XDG_RUNTIME_DIR": folder}
        arguments = command("lazymem.cli.mount", server.address, point, "--log", log, *QUIET)
        result = subprocess.run(become + arguments, env=environ, capture_output=True, text=True, check=False)
        try:
            if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:  # no udev here: the helper says so, and we pass it on
                assert result.returncode == 13
                assert "failed to open /dev/fuse: Permission denied" in result.stderr
                return
            assert result.returncode == 0, result.stderr
            mounted = mountinfo.maybe_mount_at(str(point))
            assert mounted is not None
            assert mounted.is_ours
            copy = f"import sys; sys.stdout.buffer.write(open({str(point / 'pc.ram')!r},'rb').read())"
            read = subprocess.run([*become, sys.executable, "-c", copy], env=environ, capture_output=True, check=True)
            assert read.stdout == snapshot.ram
            assert "throttle stays on" in log.read_text()
            subprocess.run([*become, "fusermount3", "-u", str(point)], env=environ, check=True, timeout=30)
        finally:
            subprocess.run(["umount", "-l", point], capture_output=True, check=False)
            # Not until the log says so: whoever logs a last line makes the log anew if the folder is being removed.
            wait_until(lambda: not started_with("XDG_RUNTIME_DIR", folder), "the daemon to end")
            assert result.returncode != 0 or "is unmounted" in log.read_text()
