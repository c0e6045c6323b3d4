"""A fork server's child: its parts that need no fork server."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazymem.cli import forkchild, forkrequest
from lazymem.cli.forkrequest import GO

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The child's and the command's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


class _SaidAtTheLastMoment(socket.socket):
    """Times out at once, and only then the command speaks."""

    speak: Callable[[], object] | None = None

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        if self.speak is not None:
            speak, self.speak = self.speak, None
            speak()
            raise TimeoutError
        return super().recv(size, flags)


def test_who_says_go_may_have_it_done(ends: Ends) -> None:
    ours, theirs = ends
    theirs.send(GO)
    assert forkchild.may_go(ours)


def test_a_go_at_the_moment_when_the_child_gives_up_counts(ends: Ends) -> None:
    ours, theirs = ends
    with _SaidAtTheLastMoment(fileno=ours.detach()) as child:
        child.speak = lambda: theirs.send(GO)
        assert forkchild.may_go(child)


def test_a_go_after_the_child_gave_up_fails_where_it_is_said(ends: Ends) -> None:
    ours, theirs = ends
    ours.settimeout(0.001)
    assert not forkchild.may_go(ours)
    with pytest.raises(BrokenPipeError):
        theirs.send(GO)


def test_a_command_that_is_gone_wants_nothing(ends: Ends) -> None:
    ours, theirs = ends
    theirs.close()
    assert not forkchild.may_go(ours)


def test_the_same_folder_on_another_mount_is_another_root(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("cannot change its root folder")
    seen, other = tmp_path / "seen", tmp_path / "other"
    for folder in (seen, other):
        folder.mkdir()
    done = subprocess.run(["mount", "--bind", seen, other], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("cannot mount")
    try:
        assert os.path.samestat(seen.stat(), other.stat())
        assert _surroundings_in(seen) == _surroundings_in(seen)
        assert _surroundings_in(seen) != _surroundings_in(other)
    finally:
        subprocess.run(["umount", other], check=True)


def _surroundings_in(root: Path) -> object:
    program = "import os, sys; os.chroot(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        found = forkchild.Process(str(process.pid)).surroundings
        process.communicate()
    return found


def test_who_died_is_not_taken_for_who_has_its_process_id_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, which may do all that it may itself."""
    program = "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        subprocess.run([sys.executable, "-c", program, tmp_path / "socket"], check=True)
        connection, _ = listener.accept()
    monkeypatch.setattr(forkrequest, "peer", lambda _: (os.getpid(), os.geteuid(), os.getegid()))
    with connection:
        if not _knows_pidfds(connection):
            pytest.skip("this kernel gives no pidfd of a socket's other end")
        with pytest.raises(forkchild.RefusedError, match="cannot see who asks"):
            forkchild.check_rights(connection)


def _knows_pidfds(connection: socket.socket) -> bool:
    try:
        os.close(connection.getsockopt(socket.SOL_SOCKET, forkchild.SO_PEERPIDFD))
    except OSError as error:
        return error.errno != errno.ENOPROTOOPT
    return True


def test_who_lives_and_is_like_us_may_ask(ends: Ends) -> None:
    forkchild.check_rights(ends[0])
