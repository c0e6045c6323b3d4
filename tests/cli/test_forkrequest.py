"""What a command and a fork server say to each other: pure parts."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymem.cli import forkrequest, mountcommand
from lazymem.cli.background import Announcer
from lazymem.cli.forkrequest import Request
from lazymem.fs.descriptorstore import SUCCESSOR_VARIABLE

TEXTS = st.binary(max_size=30).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
"""As the system gives them: any bytes but zeros."""

REQUESTS = st.builds(
    Request,
    st.lists(TEXTS, max_size=5).map(tuple),
    st.integers(0, 0o777),
    st.lists(TEXTS, max_size=5).map(tuple),
    st.dictionaries(TEXTS, TEXTS, max_size=5),
)


@given(REQUESTS)
def test_a_request_comes_out_as_it_went_in(request_in: Request) -> None:
    assert forkrequest.decode(forkrequest.encode(request_in)) == request_in


@given(st.binary(max_size=200))
def test_what_is_no_request_is_a_value_error_and_nothing_else(data: bytes) -> None:
    try:
        found = forkrequest.decode(data)
    except ValueError:
        return
    assert 0 <= found.umask <= 0o777


@pytest.mark.parametrize(
    "data", [b"", b"1\0002", b"-1\0002\0000", b"0\0001000\0000", b"0\00018\0000\0name", b"5\00018\0001\0a"]
)
def test_a_request_that_is_too_short_or_says_nonsense_is_none(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whatever it is about
        forkrequest.decode(data)


def test_who_names_a_socket_gets_it_and_who_says_no_gets_none() -> None:
    assert forkrequest.socket_path({forkrequest.SOCKET_VARIABLE: "/a"}) == "/a"
    assert forkrequest.socket_path({forkrequest.SOCKET_VARIABLE: "no"}) == ""
    assert forkrequest.socket_path({forkrequest.SOCKET_VARIABLE: ""}) == ""


def test_a_users_own_place_is_below_his_runtime_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert forkrequest.socket_path({"XDG_RUNTIME_DIR": "/run/user/1000"}) == "/run/user/1000/lazymem/forkserver.sock"
    assert forkrequest.socket_path({}) == ""


def test_roots_place_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = {forkrequest.socket_path({}), forkrequest.socket_path({"XDG_RUNTIME_DIR": "/run/user/0"})}
    assert found == {"/run/lazymem/forkserver.sock"}


@pytest.mark.parametrize("name", ["NOTIFY_SOCKET", "LISTEN_FDS", SUCCESSOR_VARIABLE])
def test_what_somebody_started_for_a_purpose_asks_nobody_else(name: str) -> None:
    assert forkrequest.socket_path({forkrequest.SOCKET_VARIABLE: "/a", name: "1"}) == ""


def test_the_same_files_are_told_by_the_same_mark() -> None:
    assert forkrequest.installed() == forkrequest.installed()
    assert forkrequest.decode(forkrequest.encode(Request(forkrequest.installed(), 0, (), {}))).installed == (
        forkrequest.installed()
    )


def test_what_a_running_process_cannot_take_over_is_what_was_read_at_its_start() -> None:
    found = {"PYTHONPATH": "/a", "LD_PRELOAD": "proxy.so"}
    assert forkrequest.read_at_start({**found, "PATH": "/b"}) == found


def test_a_path_is_the_same_bytes_whatever_the_commands_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1"))
    assert forkrequest.encode(Request((), 0, ("\xe4",), {})).endswith(b"\0\xe4")


def test_a_peer_is_who_it_is() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        found = ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, forkrequest.CREDENTIALS_BYTES)
    assert forkrequest.peer(found) == [os.getpid(), os.geteuid(), os.getegid()]


def test_the_word_that_a_command_knows_without_reading_it_is_the_daemons() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as pipe:
        Announcer(write_end).ready()
        assert pipe.read() == mountcommand.QUIETLY_READY
