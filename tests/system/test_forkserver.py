"""`lazymem-mount` with a fork server: real ones, real mounts; and without one whenever it is not what it needs."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import lazymem
from lazymem.capabilities import Capability, keep_only, no_new_privileges
from lazymem.cli.forkrequest import SOCKET_VARIABLE
from tests.support.forkservers import Forked, ForkServer, fork_server, parent_of
from tests.support.mounts import WAIT_SECONDS, Mounted, Stage, command, page_of, wait_until
from tests.support.snapshots import BuiltSnapshot

COMMAND = "lazymem.cli.mountcommand"
_PR_CAPBSET_DROP = 24
WITHOUT = "lazymem-mount: starts without the fork server: "


def is_forked(mounted: Mounted, server: ForkServer) -> bool:
    return parent_of(mounted.pid) == server.process.pid


def test_a_mount_is_a_child_of_the_fork_server_and_a_mount_like_any_other(
    snapshot: BuiltSnapshot, mounts: Stage, forker: ForkServer
) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, kind=Forked)
    assert mount.result.stderr == ""
    assert is_forked(mount, forker), (forker.log.read_text(), mount.pid, parent_of(mount.pid), forker.process.pid)
    assert Path(f"/proc/{mount.pid}/comm").read_text() == "lazymem-mount\n"
    assert os.getsid(mount.pid) != os.getsid(forker.process.pid)
    assert mount.ram_path.read_bytes() == snapshot.ram
    with mount.open_map() as mapped:
        mapped[:3] = b"new"
        assert page_of(mapped, 0).startswith(b"new")
    mount.unmount()
    wait_until(lambda: not Path(f"/proc/{mount.pid}").exists(), "nothing is left of the daemon, not even a zombie")


def test_it_is_killed_or_ended_and_its_mounts_go_on(
    snapshot: BuiltSnapshot, mounts: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = mounts.serve(snapshot.folder)
    for name, number in (("killed", signal.SIGKILL), ("ended", signal.SIGTERM)):
        folder = tmp_path / name
        folder.mkdir()
        with fork_server(folder) as forker:
            monkeypatch.setenv(SOCKET_VARIABLE, str(forker.path))
            mount = mounts.mount(server.address, name=f"mnt-{name}", kind=Forked)
            assert is_forked(mount, forker)
            forker.end(number)
        assert forker.path.exists() == (number == signal.SIGKILL)
        assert mount.ram_path.read_bytes() == snapshot.ram
        again = mounts.mount(server.address, name=f"mnt-{name}-again", kind=Forked)
        assert again.result.stderr.startswith(WITHOUT)
        mount.unmount()


def test_a_killed_daemon_that_was_forked_is_followed_by_the_next(
    snapshot: BuiltSnapshot, mounts: Stage, forker: ForkServer
) -> None:
    mount = mounts.mount(mounts.serve(snapshot.folder).address, kind=Forked)
    with mount.open_map() as mapped:
        mapped[:4] = b"mine"
        os.kill(mount.pid, signal.SIGKILL)
        assert page_of(mapped, 1) == snapshot.ram[4096:8192]
        wait_until(lambda: mount.status()["pid"] != mount.pid, "the next daemon serves")
        assert mapped[:4] == b"mine"


def test_many_commands_at_once_are_all_served(snapshot: BuiltSnapshot, mounts: Stage, forker: ForkServer) -> None:
    address = mounts.serve(snapshot.folder).address
    running = []
    for number in range(6):
        folder = mounts.folder / f"at-once-{number}"
        folder.mkdir()
        words = command(COMMAND, address, folder, "--cache", mounts.cache)
        running.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
    try:
        for number, process in enumerate(running):
            _, error = process.communicate(timeout=WAIT_SECONDS)
            assert (process.returncode, error) == (0, "")
            assert (mounts.folder / f"at-once-{number}" / "pc.ram").read_bytes() == snapshot.ram
    finally:
        for number in range(6):
            subprocess.run(["umount", "-l", mounts.folder / f"at-once-{number}"], check=False, capture_output=True)


def test_the_commands_folder_environment_umask_and_streams_are_what_counts(
    snapshot: BuiltSnapshot, mounts: Stage, forker: ForkServer, tmp_path: Path
) -> None:
    """All relative to a folder in which the fork server is not."""
    address = mounts.serve(snapshot.folder).address
    here, home = tmp_path / "here", tmp_path / "home"
    (here / "mnt").mkdir(parents=True)
    done = subprocess.run(
        command(COMMAND, address, "mnt", "--log", "mount.log"),
        cwd=here,
        env={**forker.environment(), "XDG_CACHE_HOME": str(home), "TZ": "FAR-13"},
        umask=0o027,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (here / "mnt" / "pc.ram").read_bytes() == snapshot.ram
        assert (home / "lazymem").is_dir()
        assert not stat.S_IMODE(home.stat().st_mode) & 0o027
        log = (here / "mount.log").read_text()
        assert "is ready" in log
        said = datetime.strptime(log[:19], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        assert round((said - datetime.now(UTC)) / timedelta(hours=1)) == 13, log
    finally:
        subprocess.run(["umount", here / "mnt"], check=False)


@pytest.mark.parametrize(
    "words",
    [["--version"], ["--help"], [], ["--bogus"], ["127.0.0.1:1", "/nowhere"], ["127.0.0.1:1", "/", "-o", "bogus"]],
    ids=["version", "help", "nothing", "option", "folder", "mount-option"],
)
def test_whatever_ends_a_command_early_ends_it_alike(words: list[str], forker: ForkServer) -> None:
    def done(**environment: str) -> tuple[int, str, str]:
        found = subprocess.run(
            command(COMMAND, *words),
            env={**os.environ, "COLUMNS": "120", **environment},
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        return found.returncode, found.stdout, found.stderr

    with_it = done()
    assert with_it == done(**{SOCKET_VARIABLE: "no"})
    assert with_it[1] or with_it[2]


def test_help_names_the_commands_own_cache(forker: ForkServer, tmp_path: Path) -> None:
    done = subprocess.run(
        command(COMMAND, "--help"),
        env={**forker.environment(), "XDG_CACHE_HOME": str(tmp_path / "mine"), "COLUMNS": "500"},
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert str(tmp_path / "mine" / "lazymem") in done.stdout


def test_an_unreachable_server_is_told_in_a_line_and_with_the_same_exit_code(
    mounts: Stage, forker: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = f"127.0.0.1:{place.getsockname()[1]}"
    forked = mounts.mount(address, check=False, kind=Forked)
    monkeypatch.setenv(SOCKET_VARIABLE, "no")
    alone = mounts.mount(address, check=False, kind=Forked)
    assert forked.result.returncode == alone.result.returncode != 0
    assert forked.result.stderr == alone.result.stderr
    assert forked.result.stderr.count("\n") == 1


def test_an_interrupted_command_leaves_nothing(mounts: Stage, forker: ForkServer, tmp_path: Path) -> None:
    """Its server takes the connection, and says nothing."""
    (tmp_path / "mnt").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        words = command(COMMAND, f"127.0.0.1:{silent.getsockname()[1]}", tmp_path / "mnt", "--cache", mounts.cache)
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=WAIT_SECONDS)
            assert (process.returncode, error) == (130, "lazymem-mount: interrupted; nothing is mounted\n")
            while connection.recv(4096):  # what it had said; then the daemon is gone
                pass
    assert not os.path.ismount(tmp_path / "mnt")


def test_a_mount_in_front_is_not_forked_elsewhere(
    snapshot: BuiltSnapshot, mounts: Stage, forker: ForkServer, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    words = command(COMMAND, mounts.serve(snapshot.folder).address, tmp_path / "mnt", "-f", "--cache", mounts.cache)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == f"{WITHOUT}a mount that stays in front is a process of its own\n"
            wait_until((tmp_path / "mnt" / "pc.ram").exists, "it is mounted")
        finally:
            process.terminate()
            process.communicate(timeout=WAIT_SECONDS)


def _drop_rights() -> None:
    keep_only(set(Capability) - {Capability.SETPCAP})


def _bound_rights() -> None:
    """Has them all still; what it executes would not."""
    if ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, Capability.SYS_NICE, 0, 0, 0):
        raise OSError


NEED_ROOT = (_drop_rights, _bound_rights)


@pytest.mark.parametrize("give_up", [*NEED_ROOT, no_new_privileges], ids=["capability", "bounding-set", "no_new_privs"])
def test_who_may_do_less_than_the_fork_server_gets_nothing_of_it(
    forker: ForkServer, give_up: Callable[[], None], tmp_path: Path
) -> None:
    if os.geteuid() and give_up in NEED_ROOT:
        pytest.skip("has no capability to give up")
    done = subprocess.run(
        command(COMMAND, "127.0.0.1:1", tmp_path / "none"),
        preexec_fn=give_up,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.stderr.startswith(f"{WITHOUT}it may do more than the command may\n")
    assert done.returncode not in (0, 70)


def test_who_is_in_another_namespace_mounts_there_and_not_here(forker: ForkServer, tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "--uts", *command(COMMAND, "127.0.0.1:1", tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("may not make a namespace")
    assert done.stderr.startswith(f"{WITHOUT}it is in other namespaces, or has another root folder or security label\n")


def test_another_python_environment_starts_a_python_of_its_own(forker: ForkServer, tmp_path: Path) -> None:
    done = subprocess.run(
        command(COMMAND, "127.0.0.1:1", tmp_path / "none"),
        env={**forker.environment(), "PYTHONPYCACHEPREFIX": str(tmp_path / "pycache")},
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.stderr.startswith(f"{WITHOUT}its Python was started with other PYTHON or LD variables\n")


@pytest.mark.parametrize("how", ["exchanged", "gone"])
def test_one_whose_files_are_not_the_same_takes_nothing_more_and_ends(how: str, tmp_path: Path) -> None:
    package = tmp_path / "installed" / "lazymem"
    shutil.copytree(Path(lazymem.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(package.parent), SOCKET_VARIABLE: str(tmp_path / "socket")}
    process = subprocess.Popen(
        command("lazymem.cli.forkserver", "--socket", tmp_path / "socket"),
        cwd=tmp_path,  # -m looks there first
        env=environment,
        stderr=subprocess.PIPE,
    )
    try:
        wait_until((tmp_path / "socket").exists, "it listens")
        if how == "exchanged":
            shutil.copy(package / "__init__.py", tmp_path / "next")
            os.replace(tmp_path / "next", package / "__init__.py")
        else:  # another lazymem is installed elsewhere, whose command asks
            (package / "cli" / "mountdaemon.py").unlink()
        folder = package.parent if how == "exchanged" else Path(lazymem.__file__).parents[1]
        done = subprocess.run(
            command(COMMAND, "127.0.0.1:1", tmp_path / "none"),
            cwd=folder,
            env={**environment, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        assert done.stderr.startswith(f"{WITHOUT}it has loaded other files than those that are installed\n")
        assert process.wait(WAIT_SECONDS) == 0
        assert not (tmp_path / "socket").exists()
    finally:
        process.kill()
        process.communicate()


def test_there_is_one_at_a_place_and_a_dead_ones_name_is_taken(tmp_path: Path) -> None:
    with fork_server(tmp_path) as first:
        second = subprocess.run(
            command("lazymem.cli.forkserver", "--socket", first.path),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        assert second.returncode != 0
        assert second.stderr.endswith(f"lazymem forkserver: another fork server listens on {first.path}\n")
        first.end(signal.SIGKILL)
        assert first.path.exists()
    with fork_server(tmp_path) as third:
        wait_until(lambda: _is_answered(third.path), "it listens in the dead one's place")
        assert stat.S_IMODE(third.path.stat().st_mode) == 0o600


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def test_who_says_nothing_or_nonsense_keeps_nobody_waiting(
    snapshot: BuiltSnapshot, mounts: Stage, forker: ForkServer
) -> None:
    """Each takes a child of its own, and the next is there."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as talking,
    ):
        silent.connect(str(forker.path))
        talking.connect(str(forker.path))
        assert talking.recv(4096) == b"here"
        talking.send(b"nonsense")
        assert talking.recv(4096).startswith(b"refused ")
        mount = mounts.mount(mounts.serve(snapshot.folder).address, kind=Forked)
        assert is_forked(mount, forker)


def test_an_impostor_of_another_user_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid():
        pytest.skip("cannot be another user")
    listens = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "s.bind(sys.argv[1]); s.listen(); print(flush=True); c, _ = s.accept(); print(len(c.recv(1 << 18)))"
    )
    with tempfile.TemporaryDirectory() as name:  # which others may enter, as pytest's may not
        os.chmod(name, 0o777)  # for the impostor
        path = Path(name, "impostor")
        with subprocess.Popen(
            [sys.executable, "-c", listens, str(path)], stdout=subprocess.PIPE, text=True
        ) as impostor:
            try:
                wait_until(path.exists, "it listens")
                monkeypatch.setenv(SOCKET_VARIABLE, str(path))
                done = subprocess.run(
                    command(COMMAND, "127.0.0.1:1", tmp_path / "none"),
                    capture_output=True,
                    text=True,
                    timeout=WAIT_SECONDS,
                    check=False,
                )
                heard, _ = impostor.communicate(timeout=WAIT_SECONDS)
            finally:
                impostor.kill()
    assert done.stderr.startswith(f"{WITHOUT}it is another user's\n")
    assert heard.split() == ["0"]
