"""Settings: every spelling of a server, and near-misses refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazymem.errors import UsageError
from lazymem.settings import (
    LinkSettings,
    MountSettings,
    ServerAddress,
    TcpEndpoint,
    UnixEndpoint,
    default_cache_dir,
    parse_endpoint,
    parse_server,
    parse_servers,
    servers_text,
)

GOOD = {
    "localhost:7411": ServerAddress(TcpEndpoint("localhost", 7411)),
    "192.0.2.7:1/web": ServerAddress(TcpEndpoint("192.0.2.7", 1), "web"),
    "[::1]:7411": ServerAddress(TcpEndpoint("::1", 7411)),
    "[2001:db8::7]:65535/a b": ServerAddress(TcpEndpoint("2001:db8::7", 65535), "a b"),
    "unix:/run/l.sock": ServerAddress(UnixEndpoint("/run/l.sock")),
    "unix:/run/l.sock:/web": ServerAddress(UnixEndpoint("/run/l.sock"), "web"),
    "unix:l.sock:/web": ServerAddress(UnixEndpoint("l.sock"), "web"),
    "unix:/run/a:b.sock": ServerAddress(UnixEndpoint("/run/a:b.sock")),
}

BAD = [
    "",
    "host",
    ":7411",
    "host:",
    "host:x",
    "host:-1",
    "host:0",
    "host:65536",
    "host:1000000",
    "host:\u0661",
    "::1:7411",
    "[::1:7411",
    "::1]:7411",
    "[]:7411",
    "ho st:1",
    "host:1/",
    "host:1/.",
    "host:1/..",
    "host:1/a/b",
    "host:1/a\0",
    "host:1/" + "n" * 256,
    "unix:",
    "unix:a\0b",
    "unix:/run/l.sock:/",
    "unix:" + "p" * 108,
]


@pytest.mark.parametrize("text", GOOD)
def test_server_is_read_and_printed_as_given(text: str) -> None:
    assert parse_server(text) == GOOD[text]
    assert str(parse_server(text)) == text


@pytest.mark.parametrize("text", BAD)
def test_near_misses_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_server(text)


def test_listener_may_leave_the_port_to_the_kernel() -> None:
    assert parse_endpoint("127.0.0.1:0") == TcpEndpoint("127.0.0.1", 0)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_times_are_positive(seconds: float) -> None:
    with pytest.raises(UsageError):
        LinkSettings(ping_interval_seconds=seconds)
    with pytest.raises(UsageError):
        MountSettings(parse_servers("h:1"), Path("/m"), Path("/c"), deadline_seconds=seconds)


@pytest.mark.parametrize("state", ["/c", "/c/run-1", "/c/a/b"])
def test_state_is_not_in_the_cache(state: str) -> None:
    """Which anybody may empty at any time."""
    with pytest.raises(UsageError, match="deleted at any time"):
        MountSettings(parse_servers("h:1"), Path("/m"), Path("/c"), state_dir=Path(state))


def test_cache_folder_follows_xdg() -> None:
    assert default_cache_dir({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/lazymem")
    assert default_cache_dir({"XDG_CACHE_HOME": "relative", "HOME": "/h"}) == Path("/h/.cache/lazymem")
    assert default_cache_dir({}) == Path("/var/cache/lazymem")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:1", ["a:1"]),
        ("a:1,b:2/web", ["a:1", "b:2/web"]),
        ("[::1]:7411,unix:/run/s:/web,a:1", ["[::1]:7411", "unix:/run/s:/web", "a:1"]),
        ("unix:/run/a,,b,a:1/x,,y", ["unix:/run/a,b", "a:1/x,y"]),
        ("a:1/x,,,b:1", ["a:1/x,", "b:1"]),
    ],
)
def test_several_servers_in_one_word(text: str, words: list[str]) -> None:
    found = parse_servers(text)
    assert [str(server) for server in found] == words
    assert servers_text(found) == text
    assert parse_servers(servers_text(found)) == found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not HOST:PORT"),
        ("a:1,", "not HOST:PORT"),
        (",a:1", "not HOST:PORT"),
        ("a:1,,b:2", "in brackets"),
        ("a:1,b", "'b' is not HOST:PORT"),
        ("a:1,b:1,a:1", "twice"),
        (",".join(f"a:{port}" for port in range(1, 18)), "17 servers"),
    ],
)
def test_no_list_of_servers(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        parse_servers(text)
