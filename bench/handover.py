"""A running guest handed over by lazymem send and lazymem receive, both on this host, a link between them."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.images import Image
from bench.lazymemways import client_tls, make_certificates, server_tls
from bench.links import Link, through
from bench.linuximage import SCREEN
from bench.way import WayError, copy_sparse
from lazymem.demo.processes import child, open_monitor
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import take_over
from lazymem.demo.serialline import SerialLine
from lazymem.tls.options import tls_words
from lazymem.vm.qmpclient import QmpClient

RELEASE_SECONDS = 300.0


def handed_over(
    link: Link, image: Image, folder: Path, *, screen: bool = False, tls: bool = False, warm: float = 0.0
) -> dict[str, Any]:
    """The report of a hand-over that ended: the guest is at the destination, with all of its RAM. `screen`: the guest
    has one, and writes it all the time. `tls`: both sides have certificates. `warm`: for so many seconds its pages go
    ahead of it.

    Raises:
        WayError: it is not.
    """
    ram = folder / "source.ram"
    copy_sparse(image.ram, ram)
    more = SCREEN * screen
    source = QemuOptions(ram, image.ram_bytes, folder / "s.qmp", folder / "s.serial", incoming="defer", more=more)
    with ExitStack() as stack:
        serial = stack.enter_context(SerialLine(folder / "s.serial"))
        process = stack.enter_context(child(source.command(), folder / "source.log"))
        with open_monitor(source.qmp, process, folder / "source.log") as qmp:
            take_over(qmp, image.vmstate)  # its monitor serves one client, which is lazymem send from here on
        if screen:
            serial.ask("draw", "draw")
        send = _command("send", "--qmp", source.qmp, "--listen", "127.0.0.1:0", "--journal", folder / "given", "--json")
        if tls:
            make_certificates(folder)
            send += server_tls(folder)
        send += ["--warm", f"{warm:g}"] if warm else []
        sending = stack.enter_context(_piped(send))
        assert sending.stdout is not None
        seen = stack.enter_context(through(link, json.loads(sending.stdout.readline())["listening"]))
        stack.enter_context(SerialLine(folder / "d.serial"))
        (folder / "mnt").mkdir()
        receive = _command("receive", seen.address, folder / "mnt", "--cache", folder / "cache", "--json")
        if tls:
            receive += tls_words(client_tls(folder))
        receive += ["--journal", str(folder / "taken"), "-qmp", f"unix:{folder}/d.qmp"]
        receiving = stack.enter_context(_piped([*receive, "--", "-serial", f"unix:{folder}/d.serial"]))
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
