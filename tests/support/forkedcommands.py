"""Many `dyingcommand`s quickly: forked by one process that has imported everything, as are their mounts and emulators.

Else most of a hand-over of a small guest is Python starting five times. What a destination forks, in one of its
threads, is a process with that one thread.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

_POLL_SECONDS = 0.005
_PID_NAME = "pid"


class ForkServer:
    """The process, from here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forkedcommands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, words: list[str], out: Path, err: Path, environment: Mapping[str, str]) -> Forked:
        """A `dyingcommand` with these words."""
        return Forked(self, self.ask(words=words, out=str(out), err=str(err), environment=dict(environment)))

    def start_vm(self, words: list[str], log: Path) -> Forked:
        """A lazymem-vm."""
        question = {"words": words, "out": str(log), "err": str(log), "environment": dict(os.environ)}
        return Forked(self, self.ask(vm=True, **question))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Forked:
    """As a `subprocess.Popen`."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else 1e9)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked command", timeout or 0.0)
            time.sleep(_POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    try:
        yield server
    finally:
        server.close()


def _serve() -> None:
    from lazymem.cli import mountdaemon, receivehost, vm, vm_run  # noqa: F401 (what is imported late)
    from tests.support import dyingcommand

    patched: Any = receivehost
    patched.subprocess = _Subprocess()
    patched._maybe_emulator_with = _maybe_forked_with

    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            answer: int | None = _maybe_code(question["poll"])
        else:
            work = vm.main if "vm" in question else dyingcommand.run
            answer = _fork(partial(work, question["words"]), question)
        print(json.dumps(answer), flush=True)


def _maybe_code(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


class _Subprocess:
    """What `receivehost` uses of the module of that name; both commands are Python's, whatever they are named."""

    DEVNULL = subprocess.DEVNULL

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryFile("w+") as said:
            pid = _fork_main(command, said.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said.seek(0)
            return subprocess.CompletedProcess(command, code, "", said.read())

    def Popen(self, command: list[str], stderr: IO[bytes], **_: Any) -> _Child:  # noqa: N802
        child = _Child(_fork_main(command, stderr.fileno()))
        _sockets(command).joinpath(_PID_NAME).write_text(str(child.pid))
        return child


def _sockets(command: list[str]) -> Path:
    return next(Path(word.removeprefix("unix:")).parent for word in command if word.startswith("unix:"))


def _maybe_forked_with(sockets: Path) -> int | None:
    """As `receivehost._maybe_emulator_with`, which goes by command lines, and here all have the same."""
    with contextlib.suppress(OSError):
        return int(sockets.joinpath(_PID_NAME).read_text())
    return None


class _Child:
    """A `Popen` of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._asking = threading.Lock()

    def poll(self) -> int | None:
        with self._asking:
            if self._code is None:
                self._code = _maybe_code(self.pid)
            return self._code


def _fork_main(command: list[str], error: int) -> int:
    """A new session with `command`, its errors to that descriptor; its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.dup2(error, 2)
    _forget_trio()
    name, arguments = command[2], command[3:]
    sys.argv = [name, *arguments]
    main = importlib.import_module(name).main
    return _be_ended_by(lambda: main(arguments))


def _forget_trio() -> None:
    """This was a thread of a process that ran it."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.closerange(3, 256)


def _fork(work: Callable[[], int], question: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.clear()
    os.environ.update(question["environment"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for target, name in ((0, os.devnull), (1, question["out"]), (2, question["err"])):
        descriptor = os.open(name, os.O_RDONLY if target == 0 else flags, 0o600)
        os.dup2(descriptor, target)
        os.close(descriptor)
    return _be_ended_by(work)


def _be_ended_by(work: Callable[[], int]) -> NoReturn:
    code = 70
    try:
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:  # noqa: BLE001 (nothing of it may reach the parent's code)
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
