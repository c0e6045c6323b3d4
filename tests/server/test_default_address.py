"""Without --listen the server is on 127.0.0.1:7411, and nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.privileges import maybe_own_network
from tests.support.snapshots import make_snapshot

ROOT = Path(__file__).resolve().parents[2]

SERVED = """
import fcntl, json, socket, struct, subprocess, sys
from lazymem.wire.messages import Hello, Welcome
from tests.server.test_command import COMMAND, plain_client

def listeners(name):
    rows = [line.split() for line in open(f"/proc/net/{name}").read().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A"]

with socket.socket() as any_socket:  # a new network's loopback is down: SIOCSIFFLAGS with IFF_UP
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 1))
with subprocess.Popen([*COMMAND, sys.argv[1], "--json"], stdout=subprocess.PIPE, text=True) as server:
    try:
        said = json.loads(server.stdout.readline())
        stream, _ = plain_client("127.0.0.1:7411")
        stream.close()
        print(json.dumps([said["listening"], listeners("tcp"), listeners("tcp6")]))
    finally:
        server.terminate()
"""
"""Runs in a network of its own, where the port is free whatever the machine does."""


BOUND = """
import socket, sys
from lazymem_server import app

bind = socket.socket.bind

def bind_elsewhere(self, address):
    print(*address, flush=True)
    bind(self, (address[0], 0))

socket.socket.bind = bind_elsewhere
sys.exit(app.main())
"""
"""On the machine's own network, where the port may be another's: what it would listen on, and a port that is free."""


def test_it_listens_there_and_nowhere_else(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    alone = maybe_own_network()
    folder = make_snapshot(tmp_path / "web").folder
    if alone is None:
        skips.stood_in(request.node, f"another port, for a network of its own: {skips.OWN_ROOT}")
        binds_one(folder)
        return
    command = [*alone, sys.executable, "-c", SERVED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["127.0.0.1:7411"], [f"0100007F:{7411:04X}"], []]


def binds_one(folder: Path) -> None:
    command = [sys.executable, "-c", BOUND, str(folder), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "127.0.0.1 7411\n"
            (where,) = json.loads(server.stdout.readline())["listening"]
            assert where.startswith("127.0.0.1:")
        finally:
            server.terminate()
        assert server.stdout.read() == "", "nothing else was bound"


def test_help_says_so() -> None:
    command = [sys.executable, "-m", "lazymem_server.app", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "default 127.0.0.1:7411" in " ".join(said.split())
