"""QEMU's own post-copy, from a source that holds the guest to a destination that has nothing yet."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.images import Image
from bench.links import Link, Through, through
from bench.linuximage import SCREEN
from bench.way import WayError, copy_sparse, wait_until
from lazymem.demo.processes import child, open_monitor
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import take_over
from lazymem.demo.serialline import SerialLine
from lazymem.errors import LazymemError
from lazymem.vm.qmpclient import QmpClient

_CAPABILITIES = [{"capability": "postcopy-ram", "state": True}]
_UNLIMITED = 1 << 40
"""Bytes a second that QEMU may use before post-copy; its default would be slower than the link."""


@dataclass(slots=True)
class PostCopy:
    """The destination, asked to take over. Times are perf_counter's; `migrating`: when the source was told.
    `downtime_seconds`: from the source's event STOP to the destination's RESUME, by their own time stamps."""

    started: float
    migrating: float
    resumed: float
    serial: SerialLine
    source: QmpClient
    seen: Through
    downtime_seconds: float

    def wait_done(self, seconds: float = 300) -> float:
        """When the source had sent everything, by its own clock, which may have been before it was asked."""
        answer: dict[str, Any] = {}

        def done() -> bool:
            answer.update(self.source.command("query-migrate"))
            if answer.get("status") == "failed":
                raise WayError("the migration failed")
            return answer.get("status") == "completed"

        wait_until(done, "the end of the stream", seconds)
        return self.migrating + float(answer["total-time"]) / 1000


@contextmanager
def migrated(link: Link, image: Image, folder: Path, *, draws: str = "") -> Iterator[PostCopy]:
    """A guest that has just begun to run here. `draws`: as in `handover.linux_guest`.

    Raises:
        WayError: QEMU may not use userfaultfd, or the migration failed.
    """
    ram = folder / "source.ram"
    copy_sparse(image.ram, ram)
    more = SCREEN if draws else ()
    source = QemuOptions(ram, image.ram_bytes, folder / "s.qmp", folder / "s.serial", incoming="defer", more=more)
    with ExitStack() as stack:
        source_serial = stack.enter_context(SerialLine(folder / "s.serial"))
        process = stack.enter_context(child(source.command(), folder / "source.log"))
        source_qmp = stack.enter_context(open_monitor(source.qmp, process, folder / "source.log"))
        take_over(source_qmp, image.vmstate)
        if draws:
            source_serial.ask(f"draw {draws}", "draw")
        source_qmp.command(
            "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": False}, *_CAPABILITIES]
        )
        source_qmp.command("migrate-set-parameters", **{"max-bandwidth": _UNLIMITED})
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        seen = stack.enter_context(through(link, f"127.0.0.1:{port}"))

        begun = time.perf_counter()
        destination = QemuOptions(
            ram, image.ram_bytes, folder / "d.qmp", folder / "d.serial", incoming="defer", more=more
        )
        serial = stack.enter_context(SerialLine(folder / "d.serial"))
        command = [_anonymous(word, image) for word in destination.command()]
        process = stack.enter_context(child(command, folder / "destination.log"))
        qmp = stack.enter_context(open_monitor(destination.qmp, process, folder / "destination.log"))
        try:
            qmp.command("migrate-set-capabilities", capabilities=_CAPABILITIES)
        except LazymemError as error:
            raise WayError(f"no post-copy here (userfaultfd?): {error}") from error
        qmp.command("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
        migrating = time.perf_counter()
        source_qmp.command("migrate", uri=f"tcp:{seen.address}")
        _start_postcopy(source_qmp)
        qmp.wait_status(lambda state: state == "running", 60)
        resumed = time.perf_counter()
        downtime = _moment(qmp, "RESUME") - _moment(source_qmp, "STOP")
        found = PostCopy(begun, migrating, resumed, serial, source_qmp, seen, downtime)
        yield found
        with contextlib.suppress(WayError):
            found.wait_done()


def _moment(qmp: QmpClient, name: str) -> float:
    """Seconds since 1970 of the last event of that name; waits for the first."""
    moments = [event.seconds for event in qmp.take_events() if event.name == name]
    while not moments:
        event = qmp.next_event(10)
        if event is None:
            raise WayError(f"no event {name}")
        if event.name == name:
            moments.append(event.seconds)
    return moments[-1]


def _start_postcopy(source: QmpClient) -> None:
    """As soon as the migration is on its way: before that QEMU refuses."""

    def active() -> bool:
        return source.command("query-migrate").get("status") in ("active", "completed", "failed")

    wait_until(active, "the migration to begin")
    source.command("migrate-start-postcopy")


def _anonymous(word: str, image: Image) -> str:
    """The RAM of a post-copy destination is ordinary memory."""
    if word.startswith("memory-backend-file,"):
        return f"memory-backend-ram,id=pc.ram,size={image.ram_bytes}"
    return word
