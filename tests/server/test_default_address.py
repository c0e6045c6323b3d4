"""Without --listen the server is on 127.0.0.1:7411, and nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_it_listens_there_and_nowhere_else(tmp_path: Path) -> None:
    alone = maybe_own_network()
    if alone is None:
        pytest.skip("no network of its own: neither root, nor sudo without a password, nor user namespaces")
    folder = make_snapshot(tmp_path / "web").folder
    command = [*alone, sys.executable, "-c", SERVED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["127.0.0.1:7411"], [f"0100007F:{7411:04X}"], []]


def test_help_says_so() -> None:
    command = [sys.executable, "-m", "lazymem_server.app", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "default 127.0.0.1:7411" in " ".join(said.split())
