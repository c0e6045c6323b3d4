"""The README's tour, run as printed: every block marked `sh tour`, in order, in one shell and an empty folder."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem.fs import mountinfo
from tests.support.mounts import Mounted

pytestmark = pytest.mark.system

CHECKOUT = Path(__file__).parents[2]
PORTS = ("7411", "7412", "7413")


def _free_ports() -> Iterator[str]:
    """Which nobody gets by chance before the tour does: not of those that the kernel gives out."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    others = [port for port in range(10_000, 65_536) if not first <= port <= last] or range(10_000, 65_536)
    for port in random.sample(others, min(1000, len(others))):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            yield str(port)


def _script(readme: str) -> str:
    """The blocks as one script that ends at the first failure, with ports that nobody has here."""
    blocks = re.findall(r"^```sh tour\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    text = "\n".join(blocks)
    assert all(port in text for port in PORTS)
    ports = dict(zip(PORTS, _free_ports(), strict=False))
    return "set -eu\n" + re.sub("|".join(PORTS), lambda found: ports[found[0]], text)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    mounted = mountinfo.maybe_mount_at(str(tmp_path / "mnt"))
    if mounted is not None:
        left = Mounted.__new__(Mounted)
        left.path = tmp_path / "mnt"
        left.clean_up()


@pytest.mark.timeout(180)
def test_the_tour(folder: Path) -> None:
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LAZYMEM": str(CHECKOUT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    with open(folder / "output", "w") as output_file:  # not a pipe: the tour's servers would keep it open
        shell = subprocess.Popen(
            ["bash", "-c", _script((CHECKOUT / "README.md").read_text())],
            cwd=folder,
            env=environ,
            stdout=output_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        shell.wait(120)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)  # what the tour left running: its servers
        shell.wait()
        output = (folder / "output").read_text()
    assert shell.returncode == 0, output
    # Its last line may have no end: the emulator was killed, and a serial line carries one byte at a time.
    whole = (folder / "second.txt").read_text().rpartition("\n")[0]
    ticks = [int(line.split()[1]) for line in whole.splitlines() if "tick" in line]
    assert ticks[0] > 50 > 0, "it went on, and did not begin again"
    assert ticks == sorted(ticks)
    assert "manifest.json" in output
    assert output.count("demand faults") == 2
    assert mountinfo.maybe_mount_at(str(folder / "mnt")) is None
