"""Command to mount ready, and what a 64 GiB image costs before anything of it is touched."""

from __future__ import annotations

from bench import images
from bench.context import Context, Measure, Target, pairs
from bench.images import Image
from bench.mountprocesses import bytes_of_each, resident_bytes, wait_settled
from bench.record import Sample

SPARSE_GIB = 64


def _run(context: Context, image: Image) -> Sample:
    with context.mounted(image) as (mount, _, _):
        figures = {"ready_seconds": mount.ready_seconds}
        if mount.daemon_pid is not None:
            figures["daemon_resident_bytes"] = resident_bytes(mount.daemon_pid)
        if mount.is_lazymem:
            wait_settled(mount)
            of_each = bytes_of_each(mount, lambda pid: resident_bytes(pid, "Pss"))
            figures["all_resident_bytes"] = sum(of_each.values())
    return context.sample(figures)


def _run_ready(context: Context) -> Sample:
    return _run(context, context.image)


def _run_sparse(context: Context) -> Sample:
    return _run(context, images.sparse(context.work, SPARSE_GIB))


READY = Measure(
    "ready",
    "command to mount ready",
    pairs(("loopback", "20ms"), ("lazymem", "lazymem+forked", "nbdfuse", "qsd")),
    _run_ready,
    (Target("command to mount ready", "loopback", "lazymem", "ready_seconds", must=0.25),),
)

SPARSE = Measure(
    "sparse",
    "64 GiB sparse image",
    pairs(("loopback",), ("lazymem", "nbdfuse", "qsd")),
    _run_sparse,
    (
        Target("64 GiB sparse image: to ready", "loopback", "lazymem", "ready_seconds", must=0.5),
        Target("64 GiB sparse image: resident", "loopback", "lazymem", "all_resident_bytes", must=150e6),
    ),
)
