"""`lazymem-mount` at a server that lies in its first word: refused in one line, nothing mounted, next to nothing on the
disk."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from lazymem.fs import mountinfo
from lazymem.wire.codec import encode
from lazymem.wire.frame import HEADER, FrameType
from lazymem.wire.limits import MAX_FILE_OFFSET, MAX_PAGES
from lazymem.wire.messages import Capability, Error, ErrorCode, Goodbye, Welcome
from tests.support.mounts import command
from tests.support.snapshots import make_snapshot
from tests.support.wiremessages import WELCOME

pytestmark = pytest.mark.system

PLAIN = replace(WELCOME, name="web", capabilities=Capability.NONE, hashed=False, manifest=b"", vmstate_bytes=0)

RAM_BYTES_AT = HEADER.size + 20
"""Where a WELCOME has the size of the RAM."""


def with_ram_bytes(size: int) -> bytes:
    frame = bytearray(encode(PLAIN))
    struct.pack_into("<Q", frame, RAM_BYTES_AT, size)
    return bytes(frame)


def hashed(folder: Path, **changes: object) -> bytes:
    """A right WELCOME to a hashed snapshot, but for `changes`."""
    built = make_snapshot(folder, pages=64)
    assert built.manifest is not None
    right = Welcome(
        1, Capability.NONE, PLAIN.limits, "web", built.identity, len(built.ram), True, built.manifest.to_json(), 12
    )
    return encode(replace(right, **changes))


CLAIMS: dict[str, bytes] = {
    "64 TiB of RAM": encode(replace(PLAIN, ram_bytes=MAX_PAGES << 12)),
    "more RAM than there can be": with_ram_bytes(2**63),
    "another snapshot's name": encode(replace(PLAIN, name="other")),
    "a manifest that is none": encode(replace(PLAIN, hashed=True, manifest=b"{" * 10000)),
    "a WELCOME of 4 GiB": HEADER.pack(2**32 - 1, FrameType.WELCOME, 0, 0, 0),
    "a goodbye": encode(Goodbye("")),
    "an error that moves the cursor": HEADER.pack(9, FrameType.ERROR, 0, 0, 0) + b"\x65\0\0\0\x1b[2J\n",
    "an error of a thousand characters": encode(Error(0, ErrorCode.NO_SUCH_SNAPSHOT, "x" * 1024)),
}  # fmt: skip


@contextlib.contextmanager
def server_that_says(data: bytes) -> Iterator[str]:
    """To everybody, whatever he says, then and later; and waits for him to leave."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.settimeout(30)
                        connection.recv(4096)
                        connection.sendall(data)
                        while connection.recv(4096):
                            pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}/web"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def refused(folder: Path, said: bytes) -> str:
    mountpoint, cache = folder / "mnt", folder / "cache"
    mountpoint.mkdir()
    with server_that_says(said) as address:
        arguments = (address, mountpoint, "--cache", cache, "--prefetch", "none", "-f", "--no-supervisor")
        try:  # in front: a mount that is made after all ends with the process
            found = subprocess.run(
                command("lazymem.cli.mount", *arguments), capture_output=True, text=True, check=False, timeout=60
            )
        finally:
            if mountinfo.maybe_mount_at(str(mountpoint)) is not None:
                subprocess.run(["umount", "-l", mountpoint], check=False, timeout=60)
    assert found.returncode not in (0, 1)
    assert (found.stdout, found.stderr.count("\n")) == ("", 1), found.stderr
    assert found.stderr.startswith("lazymem-mount: ")
    assert found.stderr.strip().isprintable()
    assert mountinfo.maybe_mount_at(str(mountpoint)) is None
    assert sum(path.stat().st_blocks for path in cache.rglob("*")) * 512 < 1 << 20
    return found.stderr


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_server_claims_at_first(tmp_path: Path, name: str) -> None:
    refused(tmp_path, CLAIMS[name])


LIES: dict[str, dict[str, object]] = {
    "other RAM than the manifest's": {"identity": bytes(32)},
    "more RAM than the manifest's": {"ram_bytes": 65 << 12},
    "a manifest of another format": {"manifest": b'{"format": "other"}'},
}


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_does_not_fit(tmp_path: Path, name: str) -> None:
    said = refused(tmp_path, hashed(tmp_path / "web", **LIES[name]))
    assert "manifest" in said


def test_a_vmstate_beyond_memory_is_not_read(tmp_path: Path) -> None:
    assert "vmstate" in refused(tmp_path, hashed(tmp_path / "web", vmstate_bytes=MAX_FILE_OFFSET))


def test_one_that_greets_and_then_leaves_again_and_again(tmp_path: Path) -> None:
    """A mount that is not there yet does not wait for ever: somebody waits for the command."""
    (tmp_path / "mnt").mkdir()
    with server_that_says(hashed(tmp_path / "web")) as address:
        arguments = (address, tmp_path / "mnt", "--cache", tmp_path / "cache", "--prefetch", "none")
        found = subprocess.run(
            command("lazymem.cli.mount", *arguments), capture_output=True, text=True, check=False, timeout=60
        )
    assert found.returncode not in (0, 1)
    assert "sends no digests of the RAM within" in found.stderr
    assert found.stderr.count("\n") == 1
