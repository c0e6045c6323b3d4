"""Two hosts as far as the network goes: a network namespace each, and a virtual cable between them. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from tests.support.vmprocess import wait_until

_CABLE = "cable"


@dataclass(frozen=True)
class NetworkHost:
    """`on` before a command runs it there; files and processes are this machine's."""

    on: tuple[str, ...]
    address: str

    def run(self, *command: str) -> str:
        return subprocess.run([*self.on, *command], check=True, capture_output=True, text=True).stdout

    def cable(self, state: str) -> None:
        """Plug it in ("up") or out ("down"): nothing tells either end."""
        self.run("ip", "link", "set", _CABLE, state)

    @property
    def received_bytes(self) -> int:
        """Over the cable."""
        return int(self.run("cat", "/proc/net/dev").partition(f"{_CABLE}:")[2].split()[0])


def booted_by_itself(host: NetworkHost, folder: Path) -> NetworkHost:
    """The same for commands that need see no mount made later: with a boot id of its own, as another machine has."""
    path = folder / f"boot-{host.address}"
    path.write_text(f"{uuid4()}\n")
    script = 'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@"'
    return replace(host, on=(*host.on, "unshare", "--mount", "sh", "-c", script, "sh", str(path)))


@contextmanager
def two_hosts() -> Iterator[tuple[NetworkHost, NetworkHost]]:
    with ExitStack() as stack:
        pids = [stack.enter_context(_namespace()) for _ in range(2)]
        hosts = [
            NetworkHost(("nsenter", f"--net=/proc/{pid}/ns/net", "--"), f"10.77.0.{number}")
            for number, pid in enumerate(pids, 1)
        ]
        cable = ("ip", "link", "add", _CABLE, "type", "veth", "peer", "name", _CABLE, "netns", str(pids[1]))
        hosts[0].run(*cable)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", _CABLE)
            host.run("ip", "link", "set", "lo", "up")
            host.cable("up")
        yield hosts[0], hosts[1]


@contextmanager
def _namespace() -> Iterator[int]:
    """The process that keeps it: it is gone with that, cable and all."""
    process = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
    try:
        ours = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(Path(f"/proc/{process.pid}/ns/net")) != ours, "a network namespace")
        yield process.pid
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
