"""A fork server's child: its parts that need no fork server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from lazymem.cli import forkchild
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
