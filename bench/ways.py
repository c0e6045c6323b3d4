"""The ways to have another host's RAM here, each with a server's end and a mount: started as their own documents say,
ended by their own ids.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.images import Image
from bench.lazymemways import LAZYMEM_WAYS
from bench.links import Through
from bench.way import Mount, Server, Way, WayError, copy_sparse, run_to_end, unmount, wait_until
from lazymem.demo.processes import child, end, tail

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
            unmount(point)


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


NBDFUSE = Way("nbdfuse", "nbdfuse", serve_nbdkit, mount_nbdfuse)
QSD = Way("qsd", "qemu-storage-daemon", serve_nbdkit, mount_qsd)
COPY = Way("copy", "copy, then start", serve_nbdkit, mount_copied)
LOCAL = Way("local", "local", serve_nothing, mount_local)

LAZYMEM_WARM = Way("lazymem-warm", "lazymem, --warm", serve_nothing, mount_nothing)
POSTCOPY = Way("postcopy", "QEMU post-copy", serve_nothing, mount_nothing)

WAYS = {way.name: way for way in (*LAZYMEM_WAYS, LAZYMEM_WARM, NBDFUSE, QSD, POSTCOPY, COPY, LOCAL)}
