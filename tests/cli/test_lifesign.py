"""A sign of life, in a process of its own."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lazymem.cli import lifesign
from lazymem.cli.daemonprocess import has_hung_up
from tests.support.descriptors import open_descriptors
from tests.support.mounts import wait_until
from tests.support.processstatus import status_of

LIVES = """
import ctypes, os, socket, sys, threading
from lazymem.cli.lifesign import maybe_life_sign
sign = maybe_life_sign()
with socket.socket(fileno=int(sys.argv[1])) as control:
    socket.send_fds(control, [b"!"], [sign])
    threading.Thread(target=threading.Event().wait).start()
    control.recv(1)
    ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)  # exit, of this thread alone
"""
"""Then its first thread ends, as of one that is killed while another cannot end."""


def _lives() -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        code = textwrap.dedent(LIVES)
        process = subprocess.Popen([sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    return process, ours, socket.recv_fds(ours, 1, 1)[1][0]


def _threads(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def test_it_ends_with_the_process() -> None:
    process, control, sign = _lives()
    with process, control:
        assert not has_hung_up(sign)
        process.kill()
        waiting = select.poll()
        waiting.register(sign, 0)
        assert waiting.poll()[0][1] & select.POLLHUP
    os.close(sign)


def test_its_thread_has_nothing_else_open_and_handles_no_signal() -> None:
    process, control, sign = _lives()
    with process, control:
        open_there = {task.name: len(list((task / "fd").iterdir())) for task in _threads(process.pid)}
        (holder,) = [name for name, count in open_there.items() if count == 1]
        blocked = int(status_of(process.pid, int(holder))["SigBlk"], 16)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            assert blocked >> number - 1 & 1
        # The C library blocks all of them, too, while a thread makes another one.
        wait_until(lambda: not int(status_of(process.pid)["SigBlk"], 16), "the others handle them")
        process.kill()
    os.close(sign)


@pytest.mark.parametrize("why", ["no thread", "no table", "no function"])
def test_a_host_that_makes_none(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise RuntimeError("can't start new thread")

    if why == "no thread":
        monkeypatch.setattr(lifesign._thread, "start_new_thread", refuse)  # type: ignore[attr-defined]
    elif why == "no table":
        monkeypatch.setattr(lifesign, "_own_nothing_but", lambda _: False)
    else:  # its library has no such function, or there is no memory left
        monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    before = open_descriptors(collect=True)
    assert lifesign.maybe_life_sign() is None
    assert open_descriptors() == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
