"""lazymem's own ways: this checkout's `lazymem-serve` and `lazymem-mount`, each also with TLS and without a supervisor.

TLS is mutual, with certificates by `lazymem pki` that are made before any clock runs.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.images import Image
from bench.links import Through
from bench.way import (
    ALL_VARIANTS,
    PLAIN,
    START_SECONDS,
    Mount,
    MountIt,
    Server,
    Variant,
    Way,
    WayError,
    unmount,
    wait_until,
)
from lazymem.cli.forkrequest import SOCKET_VARIABLE
from lazymem.demo.processes import child, tail
from lazymem.fs import checks
from lazymem.settings import TlsSettings
from lazymem.tls.options import tls_words

RECORDED_FOLDER = "recorded"
"""Of a run's folder: what a server has learned before."""

PKI_FOLDER = "pki"
SERVER_NAME, CLIENT_NAME = "server", "client"

FORK_SERVER_SOCKET = "forkserver.sock"
"""In a run's folder."""

UNVERIFIED = Path(__file__).with_name("unverified")
"""On PYTHONPATH: pages are believed."""


def make_certificates(folder: Path) -> None:
    """An authority's, a server's and a client's, below `folder`."""
    pki = folder / PKI_FOLDER
    for words in (("init", pki), ("issue", pki, SERVER_NAME, "--server"), ("issue", pki, CLIENT_NAME, "--client")):
        command = [sys.executable, "-m", "lazymem.cli.pki", *map(str, words)]
        subprocess.run(command, check=True, capture_output=True)


def server_tls(folder: Path) -> list[str]:
    """A server's options, with what `make_certificates` made."""
    return [*tls_words(_files(folder, SERVER_NAME)), "--allow", CLIENT_NAME]


def client_tls(folder: Path) -> TlsSettings:
    """A client's files, and what it expects of its server."""
    return _files(folder, CLIENT_NAME, SERVER_NAME)


def _files(folder: Path, name: str, peer: str = "") -> TlsSettings:
    pki = folder / PKI_FOLDER
    return TlsSettings(pki / f"{name}.crt", pki / f"{name}.key", pki / "ca.crt", peer)


@contextmanager
def serve_lazymem(image: Image, folder: Path, variant: Variant = PLAIN, *, recorded: bool = False) -> Iterator[Server]:
    """`recorded`: with a working set in `folder`, which the measure put there."""
    log = folder / "lazymem-serve.log"
    command = [sys.executable, "-m", "lazymem_server.app", "--json", "--listen", "127.0.0.1:0"]
    if recorded:
        command += ["--learn", str(folder / RECORDED_FOLDER)]
    if variant.tls:
        make_certificates(folder)
        command += server_tls(folder)
    with child([*command, str(image.folder)], log) as process:
        wait_until(lambda: process.poll() is not None or '{"' in log.read_text(), "lazymem-serve")
        lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
        if not lines:
            raise WayError(f"lazymem-serve ended: {tail(log)}")
        yield Server(json.loads(lines[0])["listening"][0], process.pid)


@contextmanager
def _fork_server(folder: Path) -> Iterator[None]:
    log = folder / "forkserver.log"
    path = folder / FORK_SERVER_SOCKET
    with child([sys.executable, "-m", "lazymem.cli.forkserver", "--socket", str(path)], log) as process:
        wait_until(lambda: process.poll() is not None or path.exists(), "lazymem forkserver")
        if process.poll() is not None:
            raise WayError(f"lazymem forkserver ended: {tail(log)}")
        yield


def mount_lazymem(*options: str, module: str = "lazymem.cli.mount", variant: Variant = PLAIN) -> MountIt:
    """A mount with these options, with a cache folder of its own that is empty. `module`: the command that makes it."""

    @contextmanager
    def mount(through: Through, image: Image, folder: Path) -> Iterator[Mount]:
        point, cache = folder / "mnt", folder / "cache"
        point.mkdir()
        asks = "lazymem.cli.mountcommand" if variant.forked else module
        command = [sys.executable, "-m", asks, through.address, str(point)]
        command += ["--cache", str(cache), "--log", str(folder / "lazymem-mount.log"), *options]
        command += _protection(variant, folder)
        env = {**os.environ, SOCKET_VARIABLE: str(folder / FORK_SERVER_SOCKET) if variant.forked else "no"}
        if not variant.verified:
            env["PYTHONPATH"] = str(UNVERIFIED)
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, env=env)
        ready = time.perf_counter() - started
        if done.returncode or (variant.forked and done.stderr):  # it says so where no fork server did it
            raise WayError(f"lazymem-mount: {done.stderr.strip()}")
        found = Mount(point / "pc.ram", started, ready, is_lazymem=True)
        status = found.status()
        found.daemon_pid = int(status["pid"])
        daemon = os.pidfd_open(found.daemon_pid)  # it is nobody's child any more
        try:
            _check_supervisor(status["survival"]["kept_by"], variant)
            yield found
        finally:
            unmount(point)
            ended, _, _ = select.select([daemon], [], [], START_SECONDS)
            os.close(daemon)
            shutil.rmtree(cache, ignore_errors=True)
            if not ended:
                raise WayError("lazymem's daemon did not end after its unmount")

    return mount


def _protection(variant: Variant, folder: Path) -> list[str]:
    words = tls_words(client_tls(folder)) if variant.tls else []
    return words if variant.supervised else [*words, "--no-supervisor"]


def _check_supervisor(maybe_kept_by: str | None, variant: Variant) -> None:
    """One that did not start is left out with a notice, and the table would not know."""
    possible = checks.maybe_no_resend() is None
    if (maybe_kept_by is not None) != (variant.supervised and possible):
        raise WayError(f"the mount is kept by {maybe_kept_by}, and not as {variant} says")


def _ways(
    name: str, title: str, *options: str, module: str = "lazymem.cli.mount", recorded: bool = False
) -> tuple[Way, ...]:
    """A way, and its variants."""

    def one(variant: Variant) -> Way:
        @contextmanager
        def serve(image: Image, folder: Path) -> Iterator[Server]:
            with ExitStack() as opened:
                if variant.forked:
                    opened.enter_context(_fork_server(folder))
                yield opened.enter_context(serve_lazymem(image, folder, variant, recorded=recorded))

        mount = mount_lazymem(*options, module=module, variant=variant)
        return Way(name + variant.suffix, title + variant.title, serve, mount, variant, is_lazymem=True)

    return tuple(one(variant) for variant in ALL_VARIANTS)


LAZYMEM_WAYS = (
    *_ways("lazymem", "lazymem", "--prefetch", "all"),
    *_ways("lazymem-none", "lazymem, guessing off", "--prefetch", "none"),
    *_ways("lazymem-recorded", "lazymem, recorded", "--prefetch", "all", recorded=True),
    *_ways("lazymem-template", "lazymem, a template", "--prefetch", "all", module="lazymem.cli.template"),
)
