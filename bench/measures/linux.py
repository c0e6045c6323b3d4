"""A Linux guest in QEMU resumes here: seconds from the start of the destination to the end of two jobs in the guest.

`small` reads 16 MiB of a file in its memory, `all` reads 160 MiB after that. `local` has the RAM here already; what is
beyond it is the way's. The device state comes over the same link first, by each way's own means.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.context import Context, Measure, Target, pairs
from bench.images import Image
from bench.links import through
from bench.linuximage import ALL_MIB, SMALL_MIB, linux_image
from bench.measures.linuxrecording import give_recording
from bench.postcopy import migrated
from bench.record import Sample
from bench.way import Mount, copy_sparse, run_to_end
from bench.ways import serve_nbdkit
from lazymem.demo.qemu import QemuOptions
from lazymem.demo.qemurun import started, take_over
from lazymem.demo.serialline import SerialLine

JOB_SECONDS = 300.0

_JOBS = (f"read {SMALL_MIB}", f"read {ALL_MIB}")


def _run(context: Context) -> Sample:
    image = linux_image(context.work)
    if context.way.name == "postcopy":
        return _run_postcopy(context, image)
    with context.folder() as folder:
        if context.way.name in ("nbdfuse", "qsd"):
            copy_sparse(image.ram, folder / "served.ram")  # what the guest writes must not reach the image
        if context.way.base == "lazymem-recorded":
            give_recording(image, _JOBS, folder)
        with context.served(image, folder) as (_, seen), _state_server(context, image, folder) as state_address:
            begun = time.perf_counter()
            with context.way.mount(seen, image, folder) as mount:
                vmstate = _vmstate(context, mount, image, folder, state_address)
                return context.sample(_resumed(mount, vmstate, folder, begun))


@contextmanager
def _state_server(context: Context, image: Image, folder: Path) -> Iterator[str]:
    """The NBD ways' device state: its own nbdkit behind a link of its own, since nothing else is under way then."""
    if context.way.name not in ("nbdfuse", "qsd", "copy"):
        yield ""
        return
    near = folder / "state"
    near.mkdir()
    copy_sparse(image.vmstate, near / "served.ram")
    with serve_nbdkit(image, near) as server, through(context.link, server.address) as seen:
        yield seen.address


def _vmstate(context: Context, mount: Mount, image: Image, folder: Path, address: str) -> Path:
    if mount.is_lazymem:
        return mount.ram.parent / "vmstate"
    if not address:
        return image.vmstate
    target = folder / "vmstate"
    run_to_end(["nbdcopy", f"nbd://{address}", str(target)])
    return target


def _resumed(mount: Mount, vmstate: Path, folder: Path, begun: float) -> dict[str, float]:
    if mount.daemon_pid is None and mount.ready_seconds == 0.0:
        begun = mount.started  # local: the copy was made before
    options = QemuOptions(mount.ram, mount.ram.stat().st_size, folder / "qmp", folder / "serial", incoming="defer")
    with started(options, folder / "qemu.log") as qemu:
        with qemu.open_monitor() as qmp:
            take_over(qmp, vmstate, JOB_SECONDS)
            resumed = time.perf_counter() - begun
        figures = {"resumed_seconds": resumed, **_jobs(qemu.serial, begun)}
    if mount.is_lazymem:
        status = mount.status()
        figures["demand_faults"] = status["demand_faults"]
        figures["pages_held_at_end"] = status["pages_held"]
        if status["working_set"]:
            figures |= {f"working_{name}_pages": count for name, count in status["working_set"].items()}
    return figures


def _jobs(serial: SerialLine, begun: float) -> dict[str, float]:
    small_job, all_job = _JOBS
    serial.ask(small_job, "read", JOB_SECONDS)
    small = time.perf_counter() - begun
    serial.ask(all_job, "read", JOB_SECONDS)
    return {"small_seconds": small, "all_seconds": time.perf_counter() - begun}


def _run_postcopy(context: Context, image: Image) -> Sample:
    with context.folder() as folder, migrated(context.link, image, folder) as guest:
        figures = {"resumed_seconds": guest.resumed - guest.started, **_jobs(guest.serial, guest.started)}
        figures["stream_done_seconds"] = guest.wait_done() - guest.started
    return context.sample(figures)


_TARGETS = tuple(
    Target(
        f"Linux guest, `{job}`, time beyond local, beside nbdfuse",
        link,
        "lazymem",
        f"{job}_seconds",
        "nbdfuse",
        must=0.4,
        beyond="local",
    )
    for link in ("1ms", "20ms")
    for job in ("small", "all")
) + tuple(
    Target(
        "Linux guest, `small`, with a recorded working set, time beyond local, beside nbdfuse",
        link,
        "lazymem-recorded",
        "small_seconds",
        "nbdfuse",
        must=must,
        aim=aim,
        beyond="local",
    )
    for link, must, aim in (("1ms", 0.35, 0.25), ("20ms", 0.25, 0.2))
)

MEASURE = Measure(
    "linux",
    "a Linux guest resumes: time to the end of its jobs",
    pairs(
        ("loopback", "1ms", "20ms"),
        ("local", "lazymem", "lazymem-recorded", "lazymem-none", "nbdfuse", "qsd", "postcopy", "copy"),
    )
    + pairs(("1ms", "20ms"), ("lazymem+forked", "lazymem-recorded+forked")),
    _run,
    _TARGETS,
)
