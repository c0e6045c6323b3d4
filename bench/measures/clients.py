"""One server process, eight clients that each read the whole image, and a ninth that demands single pages meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys

from bench.context import Context, Measure, Target
from bench.lazymemways import client_tls
from bench.record import Sample
from bench.summary import quantile
from bench.way import NO_MOUNT, WayError
from lazymem.pages import PAGE_SIZE

CLIENTS = 8
SECONDS = 10.0


def _run(context: Context) -> Sample:
    with context.folder() as folder, context.served(context.image, folder) as (_, seen):
        tls = client_tls(folder) if context.way.variant.tls else None
        words = [str(tls.cert), str(tls.key), str(tls.ca), tls.name] if tls is not None else []
        readers = _started(seen.address, CLIENTS, words)
        ninth = _started(seen.address, 0, words)
        read, demanded = _result(readers), _result(ninth)
    pages, seconds = read["pages"], read["seconds"][0]
    waits = sorted(demanded["waits"])
    figures = {
        "ram_bytes_per_second": sum(pages) * PAGE_SIZE / seconds,
        "least_share": min(pages) * len(pages) / sum(pages),
        "ninth_wait_p50_seconds": quantile(waits, 0.5),
        "ninth_wait_p99_seconds": quantile(waits, 0.99),
    }
    return context.sample(figures, {"waits_seconds": waits})


def _started(address: str, clients: int, tls: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.wireclients", address, str(clients), str(SECONDS), *tls]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str]) -> dict[str, list[float]]:
    output, errors = process.communicate(timeout=SECONDS + 60)
    if process.returncode:
        raise WayError(f"a wire client ended: {errors.strip()[-300:]}")
    found: dict[str, list[float]] = json.loads(output)
    return found


MEASURE = Measure(
    "clients",
    "eight wire-level clients, and a ninth's demands",
    (("loopback", "lazymem"),),
    _run,
    (
        Target(
            "8 clients read all: RAM in sum",
            "loopback",
            "lazymem",
            "ram_bytes_per_second",
            must=1e9,
            at_least=True,
        ),
        Target("8 clients: the least one's share", "loopback", "lazymem", "least_share", must=0.5, at_least=True),
        Target("a ninth client's demand p99", "loopback", "lazymem", "ninth_wait_p99_seconds", must=0.005),
    ),
    NO_MOUNT,
)
