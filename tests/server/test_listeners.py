"""Addresses, stale Unix sockets, descriptors that are none, and names of snapshots."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from lazymem_server.catalog import Catalog, parse_spec
from lazymem_server.listeners import Listeners, TcpAddress, UnixAddress, parse_listen, spoken_address

from lazymem.errors import BusyError, EnvironmentRefusedError, SnapshotError, UsageError
from tests.support.descriptors import open_descriptors
from tests.support.snapshots import make_snapshot


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7411", TcpAddress("127.0.0.1", 7411)),
        ("some.host:0", TcpAddress("some.host", 0)),
        ("[::1]:65535", TcpAddress("::1", 65535)),
        ("unix:/run/x", UnixAddress(Path("/run/x"))),
        ("unix:x:1", UnixAddress(Path("x:1"))),
    ],
)
def test_addresses(text: str, address: object) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize(
    "text", ["", ":1", "host", "host:", "host:x", "host:65536", "::1:7411", "unix:", "h:-1", "h:²"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_listen(text)


def test_a_stale_socket_is_replaced_and_ours_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Listeners() as listeners:
        listeners.open([UnixAddress(path)])
        assert spoken_address(listeners.sockets[0]) == f"unix:{path}"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        with pytest.raises(BusyError), Listeners() as second:
            second.open([UnixAddress(path)])
        assert path.exists()
    assert not path.exists()


def test_a_socket_that_took_our_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Listeners() as listeners:
        listeners.open([UnixAddress(path)])
        path.rename(tmp_path / "ours")  # keeps the inode in use, so that the other one has another
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
        listeners.close()
    assert path.exists()


def test_what_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(UsageError, match="not a socket"), Listeners() as listeners:
        listeners.open([UnixAddress(tmp_path / "s")])
    assert (tmp_path / "s").read_text() == "precious"


def test_descriptors_that_are_no_listening_sockets() -> None:
    read_end, write_end = os.pipe()
    os.close(write_end)
    try:
        with pytest.raises(EnvironmentRefusedError, match="not a socket"), Listeners() as listeners:
            listeners.add_descriptor(read_end)
    finally:
        os.close(read_end)
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        found = socket.socket(socket.AF_INET, kind)
        with pytest.raises(EnvironmentRefusedError, match="not a listening"), Listeners() as listeners:
            listeners.add_descriptor(found.detach())


@pytest.mark.parametrize(
    "environment", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid())}]
)
def test_what_systemd_means_for_others_is_not_taken(environment: dict[str, str]) -> None:
    with Listeners() as listeners:
        assert listeners.adopt(environment) == 0


def test_names(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert parse_spec("x=/srv/y") == ("x", Path("/srv/y"))
    assert parse_spec("/srv/y/") == ("y", Path("/srv/y"))
    assert parse_spec(tmp_path / "a=b") == ("a=b", tmp_path / "a=b")
    assert parse_spec(".")[0] == Path.cwd().name
    for bad in ("/", "x" * 256 + "=/srv", "a\nb=/srv"):
        with pytest.raises(UsageError, match="cannot publish"):
            parse_spec(bad)


def test_a_bad_folder_among_good_ones_leaves_nothing_open(tmp_path: Path) -> None:
    good = make_snapshot(tmp_path / "web").folder
    before = open_descriptors(collect=True)
    with pytest.raises(SnapshotError):
        Catalog([good, tmp_path / "none"])
    with pytest.raises(UsageError):
        Catalog([good, good])
    with pytest.raises(UsageError):
        Catalog([])
    assert open_descriptors() == before
