"""The ways to have another host's RAM here, each with a server's end and a mount: started as their own documents say,
ended by their own ids. What is on the server's side is started before any clock runs.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.images import Image
from bench.links import Through
from lazymem.demo.processes import child, tail

START_SECONDS = 60.0
COMMAND_SECONDS = 300.0
STATUS_XATTR = "user.lazymem.status"


class WayError(RuntimeError):
    """A way did not start, or gave other bytes than the image has."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server's end."""

    address: str
    pid: int


@dataclass(slots=True)
class Mount:
    """A way's file here. `started`: perf_counter when its command was started; `daemon_pid` serves it, if anybody."""

    ram: Path
    started: float
    ready_seconds: float
    daemon_pid: int | None = None
    is_lazymem: bool = False
    extra: dict[str, float] = field(default_factory=dict)

    def status(self) -> dict[str, Any]:
        """lazymem's own figures."""
        found: dict[str, Any] = json.loads(os.getxattr(self.ram.parent, STATUS_XATTR))
        return found


Serve = Callable[[Image, Path], AbstractContextManager[Server]]
MountIt = Callable[[Through, Image, Path], AbstractContextManager[Mount]]


@dataclass(frozen=True, slots=True)
class Way:
    """`serve(image, folder)` on the other host, `mount(through, image, folder)` on this one."""

    name: str
    title: str
    serve: Serve
    mount: MountIt


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Poll each half millisecond. Raises WayError when the time is up."""
    give_up = time.perf_counter() + seconds
    while not condition():
        if time.perf_counter() > give_up:
            raise WayError(f"waited {seconds:g} s for {what}")
        time.sleep(0.0005)


# --- lazymem


RECORDED_FOLDER = "recorded"
"""Of a run's folder: what a server has learned before."""


PKI_FOLDER = "pki"
SERVER_NAME, CLIENT_NAME = "server", "client"


def serve_lazymem(image: Image, folder: Path) -> AbstractContextManager[Server]:
    return _serve_lazymem(image, folder)


def serve_recorded(image: Image, folder: Path) -> AbstractContextManager[Server]:
    """With a working set in `folder`, which the measure put there."""
    return _serve_lazymem(image, folder, "--learn", str(folder / RECORDED_FOLDER))


def serve_tls(image: Image, folder: Path) -> AbstractContextManager[Server]:
    """With certificates of its own, made before any clock runs; the client's are `mount_tls`'s."""
    pki = folder / PKI_FOLDER
    for words in (("init", pki), ("issue", pki, SERVER_NAME, "--server"), ("issue", pki, CLIENT_NAME, "--client")):
        command = [sys.executable, "-m", "lazymem.cli.pki", *map(str, words)]
        subprocess.run(command, check=True, capture_output=True)
    return _serve_lazymem(image, folder, *_tls_options(folder, SERVER_NAME), "--allow", CLIENT_NAME)


def _tls_options(folder: Path, name: str) -> tuple[str, ...]:
    pki = folder / PKI_FOLDER
    words = ("--tls-cert", pki / f"{name}.crt", "--tls-key", pki / f"{name}.key", "--tls-ca", pki / "ca.crt")
    return tuple(map(str, words))


@contextmanager
def _serve_lazymem(image: Image, folder: Path, *options: str) -> Iterator[Server]:
    log = folder / "lazymem-serve.log"
    command = [sys.executable, "-m", "lazymem_server.app", "--json", "--listen", "127.0.0.1:0", *options]
    command.append(str(image.folder))
    with child(command, log) as process:
        wait_until(lambda: process.poll() is not None or '{"' in log.read_text(), "lazymem-serve")
        lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
        if not lines:
            raise WayError(f"lazymem-serve ended: {tail(log)}")
        yield Server(json.loads(lines[0])["listening"][0], process.pid)


def mount_lazymem(*options: str, module: str = "lazymem.cli.mount") -> MountIt:
    """A mount with these options, with a cache folder of its own that is empty. `module`: the command that makes it."""

    @contextmanager
    def mount(through: Through, image: Image, folder: Path) -> Iterator[Mount]:
        point, cache = folder / "mnt", folder / "cache"
        point.mkdir()
        command = [sys.executable, "-m", module, through.address, str(point)]
        command += ["--cache", str(cache), "--log", str(folder / "lazymem-mount.log"), *options]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        ready = time.perf_counter() - started
        if done.returncode:
            raise WayError(f"lazymem-mount: {done.stderr.strip()}")
        found = Mount(point / "pc.ram", started, ready, is_lazymem=True)
        found.daemon_pid = int(found.status()["pid"])
        daemon = os.pidfd_open(found.daemon_pid)  # it is nobody's child any more
        try:
            yield found
        finally:
            _unmount(point)
            ended, _, _ = select.select([daemon], [], [], START_SECONDS)
            os.close(daemon)
            shutil.rmtree(cache, ignore_errors=True)
            if not ended:
                raise WayError("lazymem's daemon did not end after its unmount")

    return mount


def mount_tls(*options: str) -> MountIt:
    """As `mount_lazymem`, of a server by `serve_tls`."""

    def mount(through: Through, image: Image, folder: Path) -> AbstractContextManager[Mount]:
        tls = (*_tls_options(folder, CLIENT_NAME), "--tls-name", SERVER_NAME)
        return mount_lazymem(*options, *tls)(through, image, folder)

    return mount


def _unmount(point: Path) -> None:
    give_up = time.perf_counter() + START_SECONDS
    command = ["umount", str(point)] if os.geteuid() == 0 else ["fusermount3", "-u", str(point)]
    while os.path.ismount(point):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and time.perf_counter() > give_up:
            raise WayError(f"cannot unmount {point}: {done.stderr.strip()}")
        if done.returncode:
            time.sleep(0.02)


# --- NBD: nbdkit's file plugin, and two clients that make a file of it


@contextmanager
def serve_nbdkit(image: Image, folder: Path) -> Iterator[Server]:
    """nbdkit over the image itself, read-only (-r), or over a copy in `folder` when there is one for a guest."""
    copied = folder / "served.ram"
    words = ["nbdkit", "-f", "file"]
    words += [str(copied)] if copied.exists() else ["-r", str(image.ram)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Socket activation: the port is ours and free, and LISTEN_PID is known only inside the child.
        script = 'exec 3<&"$1"; shift; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        command = ["sh", "-c", script, "sh", str(listener.fileno()), *words]
        os.set_inheritable(listener.fileno(), True)
        with _child_with(command, folder / "nbdkit.log", [listener.fileno()]) as process:
            yield Server(f"127.0.0.1:{listener.getsockname()[1]}", process.pid)


@contextmanager
def _child_with(command: list[str], log: Path, descriptors: list[int]) -> Iterator[subprocess.Popen[bytes]]:
    from lazymem.demo.processes import end

    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=descriptors,
        )
    try:
        yield process
    finally:
        end(process)


@contextmanager
def mount_nbdfuse(through: Through, image: Image, folder: Path) -> Iterator[Mount]:
    """With its defaults: four connections where the server allows it."""
    point, pidfile = folder / "mnt", folder / "nbdfuse.pid"
    point.mkdir()
    log = folder / "nbdfuse.log"
    writable = [] if (folder / "served.ram").exists() else ["-r"]
    command = ["nbdfuse", *writable, "-P", str(pidfile), str(point / "pc.ram"), f"nbd://{through.address}"]
    started = time.perf_counter()
    with child(command, log) as process:
        wait_until(lambda: pidfile.exists() or process.poll() is not None, "nbdfuse")
        if process.poll() is not None:
            raise WayError(f"nbdfuse ended: {tail(log)}")
        found = Mount(point / "pc.ram", started, time.perf_counter() - started, process.pid)
        try:
            yield found
        finally:
            _unmount(point)


@contextmanager
def mount_qsd(through: Through, image: Image, folder: Path) -> Iterator[Mount]:
    """qemu-storage-daemon: an NBD client whose export is a file, over a file."""
    ram, pidfile = folder / "exported.ram", folder / "qsd.pid"
    ram.touch()
    log = folder / "qsd.log"
    writable = "on" if (folder / "served.ram").exists() else "off"
    node = f"driver=nbd,node-name=ram,server.type=inet,server.host={through.host},server.port={through.port}"
    if writable == "off":
        node += ",read-only=on"
    command = ["qemu-storage-daemon", "--blockdev", node, "--pidfile", str(pidfile)]
    command += ["--export", f"type=fuse,id=ram,node-name=ram,mountpoint={ram},writable={writable}"]
    started = time.perf_counter()
    with child(command, log) as process:
        wait_until(lambda: pidfile.exists() or process.poll() is not None, "qemu-storage-daemon")
        if process.poll() is not None:
            raise WayError(f"qemu-storage-daemon ended: {tail(log)}")
        wait_until(lambda: ram.stat().st_size == image.ram_bytes, "its export")
        yield Mount(ram, started, time.perf_counter() - started, process.pid)


# --- no mount at all


@contextmanager
def serve_nothing(image: Image, folder: Path) -> Iterator[Server]:
    yield Server("127.0.0.1:1", os.getpid())


@contextmanager
def mount_nothing(through: Through, image: Image, folder: Path) -> Iterator[Mount]:
    """Post-copy has no file; `postcopy` starts it."""
    raise WayError("QEMU post-copy only resumes guests")
    yield


@contextmanager
def mount_local(through: Through, image: Image, folder: Path) -> Iterator[Mount]:
    """The RAM is here already: a copy of its own, made before the clock runs, in the page cache."""
    ram = folder / "local.ram"
    copy_sparse(image.ram, ram)
    yield Mount(ram, time.perf_counter(), 0.0)


@contextmanager
def mount_copied(through: Through, image: Image, folder: Path) -> Iterator[Mount]:
    """Copy first: nbdcopy, which leaves holes out and has four connections."""
    ram = folder / "copied.ram"
    with ram.open("xb") as file:
        file.truncate(image.ram_bytes)
    started = time.perf_counter()
    command = ["nbdcopy", "--destination-is-zero", f"nbd://{through.address}", str(ram)]
    run_to_end(command)
    yield Mount(ram, started, time.perf_counter() - started)


def run_to_end(command: list[str]) -> None:
    """Raises WayError with the command's words when it fails, or takes longer than any link needs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise WayError(f"{command[0]} did not end in {COMMAND_SECONDS:g} s") from None
    if done.returncode:
        raise WayError(f"{command[0]}: {done.stderr.strip()}")


def copy_sparse(source: Path, target: Path) -> None:
    """By cp(1), which clones where the file system can and keeps holes where not."""
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", str(source), str(target)], check=True)


LAZYMEM = Way("lazymem", "lazymem", serve_lazymem, mount_lazymem("--prefetch", "all"))
LAZYMEM_NONE = Way("lazymem-none", "lazymem, guessing off", serve_lazymem, mount_lazymem("--prefetch", "none"))
LAZYMEM_TLS = Way("lazymem-tls", "lazymem, TLS", serve_tls, mount_tls("--prefetch", "all"))
LAZYMEM_NONE_TLS = Way("lazymem-none-tls", "lazymem, guessing off, TLS", serve_tls, mount_tls("--prefetch", "none"))
LAZYMEM_RECORDED = Way("lazymem-recorded", "lazymem, recorded", serve_recorded, mount_lazymem("--prefetch", "all"))
LAZYMEM_TEMPLATE = Way(
    "lazymem-template",
    "lazymem, a template",
    serve_lazymem,
    mount_lazymem("--prefetch", "all", module="lazymem.cli.template"),
)
NBDFUSE = Way("nbdfuse", "nbdfuse", serve_nbdkit, mount_nbdfuse)
QSD = Way("qsd", "qemu-storage-daemon", serve_nbdkit, mount_qsd)
COPY = Way("copy", "copy, then start", serve_nbdkit, mount_copied)
LOCAL = Way("local", "local", serve_nothing, mount_local)

POSTCOPY = Way("postcopy", "QEMU post-copy", serve_nothing, mount_nothing)

_ALL = (
    LAZYMEM,
    LAZYMEM_NONE,
    LAZYMEM_TLS,
    LAZYMEM_NONE_TLS,
    LAZYMEM_RECORDED,
    LAZYMEM_TEMPLATE,
    NBDFUSE,
    QSD,
    POSTCOPY,
    COPY,
    LOCAL,
)

WAYS = {way.name: way for way in _ALL}
