"""A running guest handed over by lazymem send and lazymem receive, both on this host, a link between them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.images import Image
from bench.lazymemways import client_tls, make_certificates, server_tls
from bench.links import Link, through
from bench.linuximage import SCREEN
from bench.pagesimage import GUEST_SECONDS
from bench.way import WayError, copy_sparse
from lazymem.demo.processes import child, open_monitor
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import take_over
from lazymem.demo.serialline import SerialLine
from lazymem.demo.vmrun import VmGuest, started
from lazymem.errors import GuestCrashError
from lazymem.tls.options import tls_words
from lazymem.vm.qmpclient import QmpClient

RELEASE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Leaving:
    """A guest that runs, and waits for `lazymem send` at its monitor. `options`: of the emulator that takes it, besides
    its monitor."""

    monitor: Path
    options: tuple[str, ...]


Guest = Callable[[Path], AbstractContextManager[Leaving]]
"""Runs it, with its files below the folder."""


def linux_guest(image: Image, *, draws: str = "") -> Guest:
    """In QEMU. `draws`: it has a screen, and what it draws there (`draw.S`)."""

    @contextmanager
    def run(folder: Path) -> Iterator[Leaving]:
        ram = folder / "source.ram"
        copy_sparse(image.ram, ram)
        qmp, line, log = folder / "s.qmp", folder / "s.serial", folder / "source.log"
        options = QemuOptions(ram, image.ram_bytes, qmp, line, incoming="defer", more=SCREEN if draws else ())
        with ExitStack() as stack:
            serial = stack.enter_context(SerialLine(line))
            process = stack.enter_context(child(options.command(), log))
            with open_monitor(qmp, process, log) as monitor:
                take_over(monitor, image.vmstate)  # its monitor serves one client, which is lazymem send from here on
            if draws:
                serial.ask(f"draw {draws}", "draw")
            stack.enter_context(SerialLine(folder / "d.serial"))
            yield Leaving(qmp, ("--", "-serial", f"unix:{folder}/d.serial"))

    return run


def pages_guest(image: Image, *, rewrites: bool) -> Guest:
    """In lazymem-vm. `rewrites`: all of its pages, over and over."""

    @contextmanager
    def run(folder: Path) -> Iterator[Leaving]:
        ram = folder / "source.ram"
        copy_sparse(image.ram, ram)
        guest = VmGuest(ram, image.ram_bytes, folder / "s.qmp", folder / "s.serial")
        with started(guest, folder / "source.log") as vm:
            with vm.open_monitor() as monitor:
                monitor.command("migrate-incoming", uri=f"file:{image.vmstate}")
                monitor.wait_status(lambda state: state == "running", GUEST_SECONDS)
            pages = int(vm.serial.ask("status", "status").split()[3])
            writer = threading.Thread(target=_rewrite, args=(vm.serial, pages), daemon=True)
            if rewrites:
                vm.serial.ask(f"rewrite {pages} 1", "rewrote", GUEST_SECONDS)
                writer.start()
            yield Leaving(guest.qmp, ("-serial", f"unix:{folder}/d.serial"))
        if rewrites:
            writer.join(GUEST_SECONDS)

    return run


def _rewrite(serial: SerialLine, pages: int) -> None:
    """Until the guest leaves; its serial port ends then."""
    with suppress(GuestCrashError, OSError):
        for seed in range(2, 1 << 32):
            serial.ask(f"rewrite {pages} {seed}", "rewrote", GUEST_SECONDS)


def handed_over(link: Link, guest: Guest, folder: Path, *, tls: bool = False, warm: float = 0.0) -> dict[str, Any]:
    """The report of a hand-over that ended: the guest is at the destination, with all of its RAM. `tls`: both sides
    have certificates. `warm`: for so many seconds its pages go ahead of it.

    Raises:
        WayError: it is not.
    """
    with ExitStack() as stack:
        leaving = stack.enter_context(guest(folder))
        send = ["--qmp", leaving.monitor, "--listen", "127.0.0.1:0", "--journal", folder / "given", "--json"]
        if tls:
            make_certificates(folder)
            send += server_tls(folder)
        send += ["--warm", f"{warm:g}"] if warm else []
        sending = stack.enter_context(_piped(_command("send", *send)))
        assert sending.stdout is not None
        seen = stack.enter_context(through(link, json.loads(sending.stdout.readline())["listening"]))
        (folder / "mnt").mkdir()
        receive = _command("receive", seen.address, folder / "mnt", "--cache", folder / "cache", "--json")
        if tls:
            receive += tls_words(client_tls(folder))
        receive += ["--journal", str(folder / "taken"), "-qmp", f"unix:{folder}/d.qmp"]
        receiving = stack.enter_context(_piped([*receive, *leaving.options]))
        stack.callback(_end_guest, folder / "d.qmp", receiving)
        said, _ = sending.communicate(timeout=RELEASE_SECONDS)
        if sending.returncode:
            raise WayError(f"lazymem send ended with {sending.returncode}: {said}")
        report: dict[str, Any] = json.loads(said.splitlines()[-1])
    if report.get("state") != "released":
        raise WayError(f"the guest was not handed over: {report}")
    return report


def _command(name: str, *words: object) -> list[str]:
    return [sys.executable, "-m", "lazymem.cli.main", name, *map(str, words)]


def _piped(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _end_guest(monitor: Path, receiving: subprocess.Popen[str]) -> None:
    """As a person does: quit the emulator; lazymem receive then ends by itself."""
    if receiving.poll() is None:
        with QmpClient(monitor) as qmp:
            qmp.command("quit")
    receiving.communicate(timeout=60)
