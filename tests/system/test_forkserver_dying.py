"""A fork server, its child or a command ends, or stands still, at any step: nothing is mounted twice, or lost."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from array import array
from pathlib import Path

import pytest

import lazymem
from lazymem.cli import forkrequest
from lazymem.cli.forkrequest import SOCKET_VARIABLE, Request
from tests.support.forkservers import Forked, ForkServer, parent_of
from tests.support.mounts import WAIT_SECONDS, Stage, command, wait_until
from tests.support.snapshots import BuiltSnapshot
from tests.support.stopping import stop

COMMAND = "lazymem.cli.mountcommand"
WITHOUT = "lazymem-mount: starts without the fork server: "


def children(server: ForkServer) -> set[int]:
    pid = server.process.pid
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def waiting_child(server: ForkServer) -> int:
    wait_until(lambda: len(children(server)) == 1, "it has forked one to wait")
    (child,) = children(server)
    return child


def connected(server: ForkServer) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(WAIT_SECONDS)
    connection.connect(str(server.path))
    assert connection.recv(4096) == forkrequest.HERE
    return connection


def ask(connection: socket.socket, *words: object) -> None:
    request = Request(forkrequest.installed(), 0o022, tuple(str(word) for word in words), dict(os.environ))
    with open(os.devnull, "r+b") as nothing:
        folder = os.open("/", os.O_PATH)
        descriptors = array("i", [nothing.fileno(), nothing.fileno(), nothing.fileno(), folder])
        connection.sendmsg([forkrequest.encode(request)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        os.close(folder)


def taken(connection: socket.socket) -> int:
    """The child's process id."""
    word = connection.recv(4096)
    assert word.startswith(forkrequest.TAKEN), word
    return int(word.removeprefix(forkrequest.TAKEN))


@pytest.mark.parametrize("step", ["connected", "asked", "refused", "taken"])
def test_a_command_that_goes_away_at_any_step_leaves_nothing_and_no_complaint(
    step: str, forker: ForkServer, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    first = waiting_child(forker)
    with connected(forker) as connection:
        if step in ("asked", "taken"):
            ask(connection, "127.0.0.1:1", tmp_path / "mnt")
        if step == "refused":
            connection.send(b"nonsense")
        if step == "taken":
            taken(connection)
    wait_until(lambda: len(children(forker) - {first}) == len(children(forker)) == 1, "only the next one waits")
    assert not os.path.ismount(tmp_path / "mnt")
    assert forker.log.read_text().splitlines() == [f"lazymem forkserver: mounts are forked from here ({forker.path})"]


def test_a_child_that_stood_still_finds_that_the_command_went_on_without_it(
    snapshot: BuiltSnapshot, mounts: Stage, forker: ForkServer
) -> None:
    """Nor did it get the command's output, whose end `Mounted` waits for."""
    child = waiting_child(forker)
    stop(child)
    mount = mounts.mount(mounts.serve(snapshot.folder).address, kind=Forked)
    assert mount.result.stderr == f"{WITHOUT}timed out\n"
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: len(children(forker) - {child}) == len(children(forker)) == 1, "only the next one waits")
    assert mount.status()["pid"] == mount.pid
    assert len(forker.log.read_text().splitlines()) == 1


def test_it_is_ended_before_it_knows_that_its_child_has_work(
    snapshot: BuiltSnapshot, mounts: Stage, forker: ForkServer
) -> None:
    """It stands still while the child takes a command, and is told to end; the mount goes on."""
    stop(forker.process.pid)
    mount = mounts.mount(mounts.serve(snapshot.folder).address, "--no-supervisor", kind=Forked)
    assert parent_of(mount.pid) == forker.process.pid
    forker.process.send_signal(signal.SIGTERM)
    forker.process.send_signal(signal.SIGCONT)
    assert forker.process.wait(WAIT_SECONDS) == 0
    assert mount.ram_path.read_bytes() == snapshot.ram
    assert mount.status()["pid"] == mount.pid


def test_a_child_that_waits_ends_with_it(forker: ForkServer) -> None:
    child = waiting_child(forker)
    died = os.pidfd_open(child)
    try:
        forker.end(signal.SIGKILL)
        assert select.select([died], [], [], WAIT_SECONDS)[0]
    finally:
        os.close(died)


def test_ctrl_c_at_its_terminal_is_no_childs(forker: ForkServer) -> None:
    child = waiting_child(forker)
    wait_until(lambda: os.getsid(child) == child, "it has left the terminal's session")


class Scripted:
    """In the fork server's place: a command that is called meets this test."""

    def __init__(self, path: Path, *words: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(WAIT_SECONDS)
            self.process = subprocess.Popen(
                command(COMMAND, *words),
                env={**os.environ, SOCKET_VARIABLE: str(path)},
                stderr=subprocess.PIPE,
                text=True,
            )
            self.connection, _ = listener.accept()
        self.connection.settimeout(WAIT_SECONDS)
        self.connection.send(forkrequest.HERE)
        assert self.connection.recv(forkrequest.MAX_BYTES)

    def result(self) -> tuple[int, str]:
        _, error = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, error


def test_a_child_that_dies_before_it_read_the_go_is_followed_by_the_command_itself(tmp_path: Path) -> None:
    found = Scripted(tmp_path / "socket", "127.0.0.1:1", tmp_path / "none")
    with found.connection:
        found.connection.send(forkrequest.TAKEN + b"%d" % os.getpid())
        assert found.connection.recv(4096, socket.MSG_PEEK) == forkrequest.GO
    code, error = found.result()
    assert error.startswith(
        f"{WITHOUT}Connection reset by peer\nlazymem-mount: the mount point {tmp_path}/none does not"
    )
    assert code not in (0, 70)


def test_a_child_that_dies_after_the_go_is_a_daemon_that_died(tmp_path: Path) -> None:
    """It may have begun: nobody does it a second time."""
    found = Scripted(tmp_path / "socket", "127.0.0.1:1", tmp_path / "none")
    with found.connection:
        found.connection.send(forkrequest.TAKEN + b"%d" % os.getpid())
        assert found.connection.recv(4096) == forkrequest.GO
    assert found.result() == (70, "lazymem-mount: the daemon died at its start; run with -f to see why\n")


def test_a_command_that_is_interrupted_before_it_was_taken_says_so(tmp_path: Path) -> None:
    found = Scripted(tmp_path / "socket", "127.0.0.1:1", tmp_path / "none")
    with found.connection:
        found.process.send_signal(signal.SIGINT)
        assert found.result() == (130, "lazymem-mount: interrupted; nothing is mounted\n")
        assert found.connection.recv(4096) == b""


def test_who_only_stands_in_a_full_queue_is_still_there(forker: ForkServer) -> None:
    stopped = [waiting_child(forker), forker.process.pid]
    for pid in stopped:
        stop(pid)
    with contextlib.ExitStack() as opened:
        try:
            while _is_room(opened, forker.path):
                pass
            second = subprocess.run(
                command("lazymem.cli.forkserver", "--socket", forker.path),
                capture_output=True,
                text=True,
                timeout=WAIT_SECONDS,
                check=False,
            )
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
    assert second.stderr.endswith(f"lazymem forkserver: another fork server listens on {forker.path}\n")


def _is_room(opened: contextlib.ExitStack, path: Path) -> bool:
    connection = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    connection.setblocking(False)
    try:
        connection.connect(str(path))
    except BlockingIOError:
        return False
    return True


def test_a_file_in_its_place_is_not_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    done = subprocess.run(
        command("lazymem.cli.forkserver", "--socket", tmp_path / "notes"),
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.endswith(f"{tmp_path}/notes exists and is not a socket\n")
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_wherever_it_comes(number: signal.Signals, tmp_path: Path) -> None:
    """While it logs, in its forks, in its child's first steps. No child is left: it would hold what it may print to."""
    for round_number in range(8):
        place = tmp_path / str(round_number)
        process = subprocess.Popen(
            command("lazymem.cli.forkserver", "--socket", place),
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # whoever runs the tests may ignore it
        )
        try:
            while not place.exists():
                pass
            for _ in range(round_number * 300):  # a little later each time
                pass
            process.send_signal(number)
            assert process.wait(WAIT_SECONDS) == 0
            assert not place.exists()
            assert process.stderr is not None
            assert len(process.stderr.read().splitlines()) <= 1
        finally:
            process.kill()
            process.communicate()


def _ignores(pid: int, number: signal.Signals) -> bool:
    """As the kernel sees it (proc_pid_status(5))."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_who_starts_it_with_nohup_is_not_heard_hanging_up(tmp_path: Path) -> None:
    place = tmp_path / "socket"
    words = ["nohup", *command("lazymem.cli.forkserver", "--socket", place)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(place.exists, "it listens")
            assert _ignores(process.pid, signal.SIGHUP)
            assert not _ignores(process.pid, signal.SIGTERM)
        finally:
            process.kill()


def test_it_holds_nothing_of_the_folder_that_it_was_started_in(tmp_path: Path) -> None:
    with subprocess.Popen(
        command("lazymem.cli.forkserver", "--socket", "socket"), cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(lambda: os.readlink(f"/proc/{process.pid}/cwd") == "/", "it has left the folder")
            process.terminate()
            assert process.wait(WAIT_SECONDS) == 0
            assert not (tmp_path / "socket").exists()
        finally:
            process.kill()


def test_it_may_have_been_started_without_standard_streams(
    snapshot: BuiltSnapshot, mounts: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the one that it logs to."""
    place = tmp_path / "socket"
    words = ["sh", "-c", 'exec "$@" 0<&- 1>&-', "sh", *command("lazymem.cli.forkserver", "--socket", place)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(place.exists, "it listens")
            monkeypatch.setenv(SOCKET_VARIABLE, str(place))
            mount = mounts.mount(mounts.serve(snapshot.folder).address, kind=Forked)
            assert (mount.result.stderr, parent_of(mount.pid)) == ("", process.pid)
            said = subprocess.run(
                command(COMMAND, "--version"), capture_output=True, text=True, timeout=WAIT_SECONDS, check=True
            )
            assert (said.stdout, said.stderr) == (f"lazymem-mount {lazymem.__version__}\n", "")
        finally:
            process.terminate()
