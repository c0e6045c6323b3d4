"""Command to mount ready, and what a 64 GiB image costs before anything of it is touched."""

from __future__ import annotations

from pathlib import Path

from bench import images
from bench.context import Context, Measure, Target, pairs
from bench.images import Image
from bench.record import Sample

SPARSE_GIB = 64


def resident_bytes(pid: int, field: str = "Rss") -> int:
    """From /proc/PID/smaps_rollup."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} for process {pid}")


def _run(context: Context, image: Image) -> Sample:
    with context.mounted(image) as (mount, _, _):
        figures = {"ready_seconds": mount.ready_seconds}
        if mount.daemon_pid is not None:
            figures["daemon_resident_bytes"] = resident_bytes(mount.daemon_pid)
    return context.sample(figures)


def _run_ready(context: Context) -> Sample:
    return _run(context, context.image)


def _run_sparse(context: Context) -> Sample:
    return _run(context, images.sparse(context.work, SPARSE_GIB))


READY = Measure(
    "ready",
    "command to mount ready",
    pairs(("loopback", "20ms"), ("lazymem", "nbdfuse", "qsd")),
    _run_ready,
    (Target("command to mount ready", "loopback", "lazymem", "ready_seconds", must=0.25),),
)

SPARSE = Measure(
    "sparse",
    "64 GiB sparse image",
    pairs(("loopback",), ("lazymem-none", "nbdfuse", "qsd")),
    _run_sparse,
    (
        Target("64 GiB sparse image: to ready", "loopback", "lazymem-none", "ready_seconds", must=0.5),
        Target("64 GiB sparse image: resident", "loopback", "lazymem-none", "daemon_resident_bytes", must=150e6),
    ),
)
