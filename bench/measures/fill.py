"""Everything held: how long, how many bytes crossed the wire, how much guest RAM a second; and a sequential read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from bench.context import Context, Measure, Target, pairs
from bench.held import cpu_seconds, wait_held
from bench.images import Image
from bench.record import Sample
from bench.way import Mount

_READ_BYTES = 1 << 20


Beside = Callable[[Mount, Path], AbstractContextManager[object]]


def _nobody(mount: Mount, folder: Path) -> AbstractContextManager[object]:
    return nullcontext()


def fill_figures(
    context: Context, image: Image, beside: Beside = _nobody
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Mount, and wait until all is held: by itself (lazymem), by the command (copy), or by reading it (the others).

    `beside`: begins at once after the mount, is part of the time, and lasts until all is held.
    """
    figures: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    with context.folder() as folder, context.served(image, folder) as (server, seen):
        before = cpu_seconds(server.pid)
        with context.way.mount(seen, image, folder) as mount, beside(mount, folder):
            if mount.is_lazymem:
                series = wait_held(mount).series()
            elif mount.daemon_pid is not None:
                read_all(mount.ram)
            seconds = time.perf_counter() - mount.started
            if mount.daemon_pid is not None:
                figures["daemon_cpu_seconds"] = cpu_seconds(mount.daemon_pid)
            figures["server_cpu_seconds"] = cpu_seconds(server.pid) - before
            carried = seen.maybe_carried()
            wire = carried.back_bytes if carried else _own_count(mount)
    figures["held_seconds"] = seconds
    figures["ram_bytes_per_second"] = image.ram_bytes / seconds
    if wire:
        figures["wire_bytes"] = wire
        figures["wire_over_zstd"] = wire / image.facts.zstd_bytes
    if context.link.rate_bytes:
        figures["seconds_over_zstd"] = seconds / (image.facts.zstd_bytes / context.link.rate_bytes)
    return figures, series


def _own_count(mount: Mount) -> float:
    return float(mount.status()["wire_received_bytes"]) if mount.is_lazymem else 0.0


def read_all(ram: Path) -> float:
    """Bytes a second of one sequential read."""
    buffer = bytearray(_READ_BYTES)
    descriptor = os.open(ram, os.O_RDONLY)
    started = time.perf_counter()
    total = 0
    try:
        while count := os.readv(descriptor, [buffer]):
            total += count
    finally:
        os.close(descriptor)
    return total / (time.perf_counter() - started)


def _run_fill(context: Context) -> Sample:
    return context.sample(*fill_figures(context, context.image))


def _run_sequential(context: Context) -> Sample:
    """lazymem: once all is held in its cache, but nothing in the kernel's; the others: as mounted."""
    with context.mounted(context.image) as (mount, _, _):
        if mount.is_lazymem:
            wait_held(mount)
        return context.sample({"read_bytes_per_second": read_all(mount.ram)})


FILL = Measure(
    "fill",
    "everything held",
    (*pairs(("loopback", "1ms", "20ms"), ("lazymem", "nbdfuse", "qsd", "copy")), ("loopback", "lazymem+tls")),
    _run_fill,
    (
        Target(
            "image wholly held, guest RAM a second, beside nbdfuse's sequential read",
            "loopback",
            "lazymem",
            "ram_bytes_per_second",
            "nbdfuse",
            must=1.0,
            aim=1.5,
            at_least=True,
        ),
        Target(
            "everything held, over zstd -3 of the distinct pages / rate",
            "20ms",
            "lazymem",
            "seconds_over_zstd",
            must=1.15,
            aim=1.05,
        ),
    ),
)

SEQUENTIAL = Measure(
    "sequential",
    "sequential read; lazymem's once all is held",
    pairs(("loopback",), ("lazymem", "nbdfuse", "qsd")),
    _run_sequential,
    (
        Target(
            "sequential read of the held image, beside nbdfuse's",
            "loopback",
            "lazymem",
            "read_bytes_per_second",
            "nbdfuse",
            at_least=True,
        ),
    ),
)
