"""Saves a running guest's device state over its monitor, its RAM file left out: `migrate` to a socket of ours.

The emulator starts to send while the guest runs, so the blocks that have no file (firmware, framebuffer) go before the
guest stops; it stops the guest itself for the rest. A unix socket works for every emulator version and needs no shell,
so nothing in a path has to be quoted; it lies beside the monitor's, a folder that the emulator sees too.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from lazymem.errors import MonitorError
from lazymem.vm.qmpclient import CommandError, QmpClient

CAPABILITY = "x-ignore-shared"

LEAVE_UNSYNCED = "x-lazymem-leave-unsynced"
"""lazymem-vm's: its next save does not wait until the RAM files are on their disks. For a guest that is handed over,
whose RAM is served out of the memory of a host that lives, and which stands meanwhile. QEMU never waits for that."""

_MAX_SOCKET_PATH = 107
"""Bytes in sockaddr_un's path, without the final zero."""

_POLL_SECONDS = 0.002
"""Each look costs the emulator some 0.1 ms; at most this much is added to the guest's pause."""

_OVER = frozenset({"completed", "failed", "cancelled"})


class SaveRefusedError(MonitorError):
    """The emulator did not even begin: the guest is as it was."""


class StreamReceiver:
    """Listens on a fresh unix socket and writes what one emulator sends to a file; removes the socket at the end."""

    def __init__(self, target: Path, beside: Path, for_user: int) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._failure: OSError | None = None
        self._target = target
        self._connection: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self.path = self._choose_path(beside)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listen(for_user)
        except BaseException:
            # Whatever it was, an interrupt included: the socket has a name that nobody else would remove.
            self._close()
            raise

    def __enter__(self) -> StreamReceiver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _listen(self, for_user: int) -> None:
        self._listener.bind(str(self.path))
        os.chmod(self.path, 0o600)
        if os.geteuid() == 0 and for_user != 0:
            os.chown(self.path, for_user, -1)
        self._listener.listen(1)
        thread = threading.Thread(target=self._receive, name="save stream", daemon=True)
        thread.start()
        self._thread = thread

    def _close(self) -> None:
        # Shutting down wakes accept and recv in the thread; closing alone would not.
        for sock in (self._listener, self._connection):
            if sock is not None:
                _shut_down(sock)
        if self._thread:
            self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        if self._folder:
            self._folder.cleanup()

    def wait_end(self, timeout_seconds: float) -> None:
        """Waits until the emulator has closed its end.

        Raises:
            OSError: the stream could not be received or written.
            MonitorError: it is not closed in time.
        """
        assert self._thread is not None
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise MonitorError(f"the emulator did not end its save stream within {timeout_seconds:.0f} s")
        if self._failure:
            raise self._failure

    def _choose_path(self, beside: Path) -> Path:
        path = Path(os.path.abspath(beside)).parent / f".lazymem-save-{secrets.token_hex(4)}"
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH and os.access(path.parent, os.W_OK):
            return path
        self._folder = tempfile.TemporaryDirectory(prefix="lazymem-", dir="/tmp")
        os.chmod(self._folder.name, 0o711)
        return Path(self._folder.name, "save")

    def _receive(self) -> None:
        try:
            self._connection, _ = self._listener.accept()
            with self._connection as connection, self._target.open("xb") as output:
                while data := connection.recv(1 << 20):
                    output.write(data)
        except OSError as error:
            # Handed to wait_end, in the thread that can act on it.
            self._failure = error


def _shut_down(sock: socket.socket) -> None:
    # Not connected, or closed: then nobody waits in it.
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def loses_writes(qmp: QmpClient) -> bool:
    """Whether it forgets pages that a guest writes while they are sent, if it looks more than once what was written.

    QEMU without KVM: it clears its log of written pages and leaves its emulated TLB as it is, which then writes on past
    the log. (9.0 mended that for the block that comes first, the RAM, alone: "physmem: Fix migration dirty bitmap
    coherency with TCG memory access", March 2024, counts from the block's begin where the TLB counts from that of all
    blocks.) The log of a migration's begin is sound, and so is a look at a guest that stands. Of 3 MiB of framebuffer
    that a guest wrote all the time, 256 to 768 of the 768 pages arrived in an older state, with 7.2.22 and with 10.0.2.
    """
    return not (qmp.maybe_command("query-kvm") or {"enabled": True})["enabled"]  # lazymem-vm does not know the command


def maybe_downtime_limit(qmp: QmpClient) -> int | None:
    """Milliseconds, as it is set; None where there is no such thing (lazymem-vm)."""
    limit = (qmp.maybe_command("query-migrate-parameters") or {}).get("downtime-limit")
    return None if limit is None else int(limit)


def set_downtime_limit(qmp: QmpClient, milliseconds: int) -> None:
    """For how long a last pass is good enough. 0: the first one while the guest runs is followed by the last."""
    qmp.command("migrate-set-parameters", downtime_limit=milliseconds)


@contextmanager
def ram_left_out(qmp: QmpClient) -> Iterator[None]:
    """The capability x-ignore-shared on, and as it was before at the end (as far as the emulator still answers). So is
    the downtime limit, which is 0 meanwhile where it `loses_writes`."""
    maybe_limit = maybe_downtime_limit(qmp) if loses_writes(qmp) else None
    if maybe_limit is not None:
        set_downtime_limit(qmp, 0)
    try:
        with _capability_on(qmp):
            yield
    finally:
        if maybe_limit is not None:
            with suppress(MonitorError):
                set_downtime_limit(qmp, maybe_limit)


@contextmanager
def _capability_on(qmp: QmpClient) -> Iterator[None]:
    states = {entry["capability"]: entry["state"] for entry in qmp.maybe_command("query-migrate-capabilities") or []}
    _set_capability(qmp, True)
    if states.get(LEAVE_UNSYNCED):  # a lazymem send that was killed just after it had set it
        qmp.command("migrate-set-capabilities", capabilities=[{"capability": LEAVE_UNSYNCED, "state": False}])
    try:
        yield
    finally:
        if states.get(CAPABILITY) is False:
            # It may have quit, as it was told to; then nothing is left to restore.
            with suppress(MonitorError):
                _set_capability(qmp, False)


def _set_capability(qmp: QmpClient, state: bool) -> None:
    qmp.command("migrate-set-capabilities", capabilities=[{"capability": CAPABILITY, "state": state}])


def save_device_state(qmp: QmpClient, monitor: Path, target: Path, timeout_seconds: float = 600) -> None:
    """Writes the save stream to `target`; the guest stands afterwards. Call within `ram_left_out`.

    Raises:
        SaveRefusedError: the emulator did not begin, with its reason.
        MonitorError: it could not save, with its reason; the guest may stand, see `let_go_on`.
        OSError: the stream could not be written.
    """
    with StreamReceiver(target, monitor, qmp.peer_uid) as receiver:
        try:
            qmp.command("migrate", uri=f"unix:{receiver.path}")
        except CommandError as error:
            raise SaveRefusedError(str(error)) from error
        status = wait_migration_over(qmp, timeout_seconds)
        if status.get("status") != "completed":
            # Our side failing (a full disk) is the cause behind the emulator's broken pipe.
            receiver.wait_end(5)
            raise MonitorError(f"the emulator could not save its state: {status.get('error-desc', status)}")
        receiver.wait_end(60)


def wait_migration_over(qmp: QmpClient, timeout_seconds: float) -> dict[str, object]:
    """query-migrate's answer once the migration has ended, one way or the other."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer: dict[str, object] = qmp.command("query-migrate") or {}
        if answer.get("status") in _OVER:
            return answer
        if time.monotonic() > deadline:
            raise MonitorError(f"the save did not end within {timeout_seconds:.0f} s: {answer}")
        time.sleep(_POLL_SECONDS)


def abandon(qmp: QmpClient) -> None:
    """Ends a save that is under way, if there is one."""
    answer = qmp.command("query-migrate") or {}
    if answer.get("status") in (None, "none", *_OVER):
        return
    # lazymem-vm knows no cancel: it ends a save by itself when the stream's other end is gone, as ours now is.
    with suppress(CommandError):
        qmp.command("migrate_cancel")
    wait_migration_over(qmp, 30)


def let_go_on(qmp: QmpClient) -> None:
    """Lets a guest that a save stopped run again; nothing when it runs."""
    if qmp.command("query-status")["status"] != "running":
        qmp.command("cont")
