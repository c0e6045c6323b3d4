"""The host's side of the serial line: every end, slow and vanishing readers, bounded buffers."""

from __future__ import annotations

import os
import pty
import socket
import stat
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.errors import BusyError, UsageError
from lazymem.vm import serial
from lazymem.vm.serial import HostLine, NullLine, open_serial
from lazymem.vm.serialends import StdioEnd


class Input:
    """Collects what a line receives, as a UART would; other threads wait for it."""

    def __init__(self, line: serial.SerialLine, limit: int = 16) -> None:
        self._line = line
        self._limit = limit
        self._arrived = threading.Semaphore(0)
        self.data = b""
        line.start(self._arrived.release)

    def wait_for(self, data: bytes) -> None:
        while self.data != data:
            assert data.startswith(self.data)
            piece = self._line.read(self._limit)
            if piece:
                self.data += piece
            else:
                assert self._arrived.acquire(timeout=60), f"only {self.data!r} came"


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "serial"


@pytest.fixture
def unix_line(socket_path: Path) -> Iterator[serial.SerialLine]:
    line = open_serial(f"unix:{socket_path}")
    yield line
    line.close()


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(path))
    return client


def receive_exactly(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = client.recv(count - len(data))
        assert piece, "closed early"
        data += piece
    return data


def greet(line: serial.SerialLine, received: Input, client: socket.socket, before: bytes = b"") -> None:
    """Wait until the line knows its client: a byte from it has come through."""
    client.sendall(b"!")
    received.wait_for(before + b"!")


def test_unix_socket_carries_both_ways(unix_line: serial.SerialLine, socket_path: Path) -> None:
    received = Input(unix_line)
    with connect(socket_path) as client:
        greet(unix_line, received, client)
        unix_line.write(b"hello")
        assert receive_exactly(client, 5) == b"hello"


def test_unix_socket_is_for_its_owner_and_goes_at_the_end(socket_path: Path) -> None:
    line = open_serial(f"unix:{socket_path},server=on,wait=off")
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    line.close()
    line.close()
    assert not socket_path.exists()


def test_a_client_may_come_before_the_guest(unix_line: serial.SerialLine, socket_path: Path) -> None:
    with connect(socket_path) as client:
        client.sendall(b"early")
        Input(unix_line).wait_for(b"early")


def test_who_came_before_the_guest_hears_its_first_word(
    unix_line: HostLine, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine the vCPU may speak before the line's own thread runs for the first time."""
    begin = threading.Event()
    step = unix_line._step
    monkeypatch.setattr(unix_line, "_step", lambda timeout_ms: begin.wait(60) and step(timeout_ms))
    with connect(socket_path) as client:
        unix_line.start(lambda: None)
        unix_line.write(b"ready")
        begin.set()
        assert receive_exactly(client, 5) == b"ready"
    assert unix_line.dropped_bytes == 0


def test_output_without_a_client_is_dropped_at_once(unix_line: HostLine, socket_path: Path) -> None:
    received = Input(unix_line)
    unix_line.write(bytes(10 * serial.OUTPUT_BYTES))
    assert unix_line.dropped_bytes == 10 * serial.OUTPUT_BYTES
    with connect(socket_path) as client:
        greet(unix_line, received, client)
        unix_line.write(b"now")
        assert receive_exactly(client, 3) == b"now", "nothing old"


def test_the_next_client_is_served_when_the_first_has_gone(unix_line: serial.SerialLine, socket_path: Path) -> None:
    received = Input(unix_line)
    with connect(socket_path) as first, connect(socket_path) as second:
        greet(unix_line, received, first)
        second.sendall(b"?")
        unix_line.write(b"1")
        assert receive_exactly(first, 1) == b"1"
        first.close()
        received.wait_for(b"!?")
        unix_line.write(b"2")
        assert receive_exactly(second, 1) == b"2"


def test_a_reader_that_stands_still_costs_one_wait_only(
    unix_line: HostLine, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = Input(unix_line)
    with connect(socket_path) as client:
        greet(unix_line, received, client)
        while not unix_line.dropped_bytes:
            unix_line.write(bytes(4096))
        waits = 0
        wait = unix_line._wait_for_room

        def counted(data: bytes) -> bool:
            nonlocal waits
            waits += 1
            return wait(data)

        monkeypatch.setattr(unix_line, "_wait_for_room", counted)
        for _ in range(1000):
            unix_line.write(b"x")
        assert waits <= 1, "not a wait for each byte: it had waited before"
        assert unix_line.dropped_bytes <= 4096 + 1000
        greet(unix_line, received, client, b"!")


def test_more_input_than_fits_waits_at_the_sender(unix_line: serial.SerialLine, socket_path: Path) -> None:
    text = bytes(range(256)) * 4096
    with connect(socket_path) as client:
        sender = threading.Thread(target=client.sendall, args=(text,))
        sender.start()
        Input(unix_line, limit=1000).wait_for(text)
        sender.join(60)
        assert not sender.is_alive()


def test_a_socket_left_behind_is_replaced_and_a_served_one_is_not(socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path))
    line = open_serial(f"unix:{socket_path}")
    with pytest.raises(BusyError, match="somebody listens there"):
        open_serial(f"unix:{socket_path}")
    with connect(socket_path) as client:
        client.sendall(b"alive")
        Input(line).wait_for(b"alive")
    line.close()


def test_file_gets_everything_by_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial, "WAIT_SECONDS", 60.0)  # behind a disk, or a thread, that is slow for a moment
    monkeypatch.setattr(serial, "CLOSE_SECONDS", 60.0)
    path = tmp_path / "log"
    path.write_bytes(b"old")
    line = open_serial(f"file:{path}")
    line.start(lambda: None)
    text = os.urandom(3 * serial.OUTPUT_BYTES)
    for at in range(0, len(text), 1000):
        line.write(text[at : at + 1000])
    line.close()
    assert path.read_bytes() == text
    line.write(b"late")


def test_stdio_end_of_input_leaves_output_working() -> None:
    in_reader, in_writer = os.pipe()
    out_reader, out_writer = os.pipe()
    line = HostLine(StdioEnd(in_reader, out_writer))
    try:
        received = Input(line)
        os.write(in_writer, b"last words")
        os.close(in_writer)
        received.wait_for(b"last words")
        line.write(b"answer")
        assert os.read(out_reader, 100) == b"answer"
        os.close(out_reader)
        line.write(b"to nobody")
    finally:
        line.close()
        os.close(in_reader)
        os.close(out_writer)


def test_terminal_is_given_back_as_it_was() -> None:
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    line = HostLine(StdioEnd(terminal, terminal))
    try:
        received = Input(line)
        local_flags = termios.tcgetattr(terminal)[3]
        assert not local_flags & (termios.ICANON | termios.ECHO)
        assert local_flags & termios.ISIG, "Ctrl-C stays Ctrl-C"
        os.write(controller, b"k")
        received.wait_for(b"k")
    finally:
        line.close()
    assert termios.tcgetattr(terminal) == before
    os.close(controller)
    os.close(terminal)


def test_close_does_not_wait_for_ever_for_a_reader(socket_path: Path) -> None:
    line = open_serial(f"unix:{socket_path}")
    received = Input(line)
    with connect(socket_path) as client:
        greet(line, received, client)
        for _ in range(2000):
            line.write(bytes(4096))
        closing = threading.Thread(target=line.close, daemon=True)
        closing.start()
        closing.join(60)
        assert not closing.is_alive()
    assert not socket_path.exists()


def test_close_without_start(tmp_path: Path) -> None:
    line = open_serial(f"file:{tmp_path / 'log'}")
    line.close()
    assert (tmp_path / "log").read_bytes() == b""


def test_none_leads_nowhere() -> None:
    line = open_serial("none")
    assert isinstance(line, NullLine)
    line.write(b"x")
    assert line.read(1) == b""


@pytest.mark.parametrize("text", ["", "stdio:x", "file:", "unix:", "unix:,server=on", "tcp:host:1", "pty"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"-serial takes stdio, file:PATH, unix:PATH or none"):
        open_serial(text)


def test_places_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"keep")
    for text in (f"file:{tmp_path}/none/log", f"unix:{tmp_path}/none/s", f"unix:{tmp_path}/plain", "unix:" + "x" * 200):
        with pytest.raises(UsageError, match=r"-serial .*: \S"):
            open_serial(text)
    assert (tmp_path / "plain").read_bytes() == b"keep"
