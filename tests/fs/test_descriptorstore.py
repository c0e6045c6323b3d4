"""Messages with descriptors, as sd_notify(3) has them, and what systemd hands over."""

import os
import socket

import pytest

from lazymem.fs import descriptorstore


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_descriptor_goes_over(kind: socket.SocketKind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    read_end, write_end = os.pipe()
    with ours, theirs:
        descriptorstore.put(ours, "fuse", write_end)
        os.close(write_end)
        message = descriptorstore.receive(theirs)
        assert message is not None
        assert message.fields == {"FDSTORE": "1", "FDNAME": "fuse", "FDPOLL": "0"}
        assert message.maybe_descriptor is not None
        assert not os.get_inheritable(message.maybe_descriptor)
        os.write(message.maybe_descriptor, b"x")
        assert os.read(read_end, 9) == b"x"
        os.close(message.maybe_descriptor)
        descriptorstore.send(ours, {"UPGRADE": "/opt/a=b \udcff"})
        message = descriptorstore.receive(theirs)
        assert message is not None
        assert (message.fields, message.maybe_descriptor) == ({"UPGRADE": "/opt/a=b \udcff"}, None)
    os.close(read_end)


def test_the_other_side_is_gone() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.close()
        assert descriptorstore.receive(ours) is None
        with pytest.raises(BrokenPipeError):
            descriptorstore.send(ours, {"READY": 1})


def test_nobody_waits_for_a_keeper_that_does_not_read() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send_many() -> None:
        for _ in range(100000):
            descriptorstore.send(ours, {"READY": 1})

    with ours, theirs, pytest.raises(BlockingIOError):
        send_many()


def test_what_is_for_another_process_is_not_taken() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "HOME": "/"}
    assert descriptorstore.take_listened(environ) == {}
    assert environ == {"HOME": "/"}
    assert descriptorstore.take_listened({}) == {}
