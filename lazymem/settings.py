"""Frozen settings, checked once where they enter; whoever gets one may trust it. Pure but for reading the environment.

How a server is named:

    HOST:PORT[/NAME]           ram.example:7411, 192.0.2.7:7411/web
    [V6]:PORT[/NAME]           [2001:db8::7]:7411/web
    unix:PATH[:/NAME]          unix:/run/lazymem.sock, unix:/run/lazymem.sock:/web

NAME picks one snapshot of several; without it the server's only one is meant. A socket whose own path holds ``:/``
cannot be named. Several servers of one snapshot stand in one word, with commas between them (a comma of a path or a
name is written twice): a:7411,b:7411/web
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct, field

from lazymem.errors import UsageError

DEFAULT_PORT = 7411

MAX_NAME_BYTES = 255
"""A snapshot's name is the name of a folder, and no file system takes a longer one."""

DEFAULT_RECORD_SECONDS = 60.0
"""From the first touch on: a guest that was resumed is at its work by then."""

MAX_SERVERS = 16
"""Addresses of one snapshot. All are tried before a wait, and each that is silent costs seconds of a guest's."""

DEFAULT_RESERVE_BYTES = 64 << 20
"""Of the disk, for what a guest writes, where --reserve does not say: half a minute of a guest that dirties 2 MiB a
second, for somebody to make room in, and hardly missed on any disk. In memory it would be missed: nothing, there."""

RESERVE_ALL_BYTES = 1 << 62
"""More than any RAM has."""

_RESERVE_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

MAX_SOCKET_PATH_BYTES = 107
"""sun_path holds 108 bytes with its zero."""


class TcpEndpoint(Struct, frozen=True):
    """`host` is a name or an address without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixEndpoint(Struct, frozen=True):
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Endpoint = TcpEndpoint | UnixEndpoint


class ServerAddress(Struct, frozen=True):
    """Where a snapshot is served. An empty name means the server's only one."""

    endpoint: Endpoint
    name: str = ""

    def __str__(self) -> str:
        if not self.name:
            return str(self.endpoint)
        separator = ":/" if isinstance(self.endpoint, UnixEndpoint) else "/"
        return f"{self.endpoint}{separator}{self.name}"


class Prefetch(enum.Enum):
    """What is brought before the guest asks for it."""

    NONE = "none"
    WORKING_SET = "working-set"
    """What an earlier resume touched, as far as the server knows, then what surrounds the guest's own faults."""
    ALL = "all"
    """The same, then the rest, until nothing is missing."""


def parse_endpoint(text: str) -> Endpoint:
    """`HOST:PORT`, `[V6]:PORT` or `unix:PATH`. Port 0 is taken (a listener lets the kernel choose).

    Raises:
        UsageError: with what is wrong with `text`.
    """
    if text.startswith("unix:"):
        return _unix(text, text.removeprefix("unix:"))
    host, separator, port = text.rpartition(":")
    if not separator or not host:
        raise UsageError(f"{text!r} is not HOST:PORT, [V6]:PORT or unix:PATH")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise UsageError(f"{text!r}: an IPv6 address stands in brackets, as in [::1]:{DEFAULT_PORT}")
    host = host.removeprefix("[").removesuffix("]")
    if not host or any(character in host for character in "[]/\0 "):
        raise UsageError(f"{text!r} holds no usable host name")
    if not (port.isascii() and port.isdigit() and int(port[:6]) <= 65535 and len(port) <= 5):
        raise UsageError(f"{text!r}: the port is {port!r}, not a number up to 65535")
    return TcpEndpoint(host, int(port))


def parse_server(text: str) -> ServerAddress:
    """What `lazymem-mount` is given: an endpoint and maybe a snapshot's name (spelling: see the module).

    Raises:
        UsageError: with what is wrong with `text`.
    """
    if text.startswith("unix:"):
        endpoint_text, separator, name = text.rpartition(":/")
        if not separator or endpoint_text == "unix":
            endpoint_text, separator, name = text, "", ""
    else:
        endpoint_text, separator, name = text.partition("/")
    endpoint = parse_endpoint(endpoint_text)
    if separator and not is_snapshot_name(name):
        raise UsageError(f"{text!r}: {name!r} cannot be a snapshot's name")
    if isinstance(endpoint, TcpEndpoint) and endpoint.port == 0:
        raise UsageError(f"{text!r}: port 0 is nobody's")
    return ServerAddress(endpoint, name)


def parse_servers(text: str) -> tuple[ServerAddress, ...]:
    """One or several servers of one snapshot, in the order in which they are tried first (spelling: see the module).

    Raises:
        UsageError: with what is wrong, and with which of them.
    """
    words = text.replace(",,", "\0").split(",")  # no argument of a command can hold a zero byte
    found = [parse_server(word.replace("\0", ",")) for word in words]
    if len(set(found)) != len(found):
        raise UsageError(f"{text!r} names a server twice")
    if len(found) > MAX_SERVERS:
        raise UsageError(f"{text!r}: {len(found)} servers, and more than {MAX_SERVERS} are not tried")
    return tuple(found)


def servers_text(servers: Sequence[ServerAddress]) -> str:
    """What `parse_servers` reads."""
    return ",".join(escaped_server(str(server)) for server in servers)


def escaped_server(text: str) -> str:
    """One server as a word of several."""
    return text.replace(",", ",,")


def parse_reserve(text: str) -> int:
    """Bytes from ``512M``, ``2G`` (K, M, G, T; binary), ``all`` (`RESERVE_ALL_BYTES`) or ``0``.

    Raises:
        UsageError: it is none of these.
    """
    if text == "all":
        return RESERVE_ALL_BYTES
    number, unit = text[:-1], text[-1:].upper()
    if text == "0":
        return 0
    if unit not in _RESERVE_UNITS or not (number.isascii() and number.isdigit() and len(number) <= 9):
        raise UsageError(f"--reserve {text}: say how much, as in 512M or 2G, or all, or 0")
    return min(int(number) * _RESERVE_UNITS[unit], RESERVE_ALL_BYTES)


def is_snapshot_name(name: str) -> bool:
    """Whether a folder, and so a snapshot, can have this name."""
    return (
        0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES
        and name not in (".", "..")
        and name.isprintable()
        and "/" not in name
    )


class TlsSettings(Struct, frozen=True):
    """Who we are and whom we believe: PEM files, absolute paths, looked at again before each connection.

    `ca`: the only authority whose certificates count. `name`: what the server's certificate must be for, if not for the
    host that was dialled; nothing to a server.
    """

    cert: Path
    key: Path
    ca: Path
    name: str = ""


class LinkSettings(Struct, frozen=True):
    """How the client treats its connections. Seconds. `tls`: over TCP, and None means without."""

    connect_timeout_seconds: float = 10.0
    """A SYN is sent again after 1, 3 and 7 s; who has not answered by then is not there."""
    next_server_seconds: float = 3.0
    """With several addresses: for one to be ready, before the next is tried beside it. Covers one lost SYN, or some
    round trips of any link."""
    handshake_timeout_seconds: float = 10.0
    ping_interval_seconds: float = 2.0
    """A connection silent for so long while something is expected from it is asked whether it lives."""
    ping_timeout_seconds: float = 5.0
    """Silence behind a ping after which the peer counts as dead: several round trips of any link, and seconds only."""
    trickle_seconds: float = 10.0
    """For the answer to a ping while something else comes: it stands behind what was asked for before."""
    trickle_bytes_per_second: float = 1024.0
    """One that brings less than this, and not the answer to a ping, is as good as dead: a modem brings more."""
    backoff_base_seconds: float = 0.05
    backoff_cap_seconds: float = 5.0
    """A guest stands still meanwhile: after a server's return it waits for this at most."""
    tls: TlsSettings | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if name != "tls":
                check_seconds(name, getattr(self, name))


class MountSettings(Struct, frozen=True):
    """Everything that a mount was told. `servers`: of one snapshot. `state_dir` None: the run's pages go at unmount.

    `template`: many map the file privately, and its bytes never change. `reserve_bytes`: of the disk, for what the
    guest writes; None: `DEFAULT_RESERVE_BYTES`, where they can be had. `candidates_dir`: pages that may turn out right.
    """

    servers: tuple[ServerAddress, ...]
    mountpoint: Path
    cache_dir: Path
    state_dir: Path | None = None
    deadline_seconds: float | None = None
    prefetch: Prefetch = Prefetch.NONE
    record_file: Path | None = None
    record_seconds: float = DEFAULT_RECORD_SECONDS
    template: bool = False
    reserve_bytes: int | None = None
    candidates_dir: Path | None = None
    link: LinkSettings = field(default_factory=LinkSettings)

    def __post_init__(self) -> None:
        if self.deadline_seconds is not None:
            check_seconds("--deadline", self.deadline_seconds)
        check_seconds("--record-seconds", self.record_seconds)
        if self.reserve_bytes is not None and self.template:
            raise UsageError("--template and --reserve: nobody writes to a template")
        if self.state_dir is not None and self.template:
            raise UsageError("--template and --state: nobody writes to a template, so there is nothing to keep")
        if self.state_dir is not None:
            _check_apart(self.cache_dir.absolute(), self.state_dir.absolute())


def _check_apart(cache: Path, state: Path) -> None:
    if state == cache:
        raise UsageError("--cache and --state are the same folder: one may be deleted at any time, the other never")
    if cache in state.parents:
        raise UsageError(f"--state {state} is inside of --cache {cache}, which may be deleted at any time")


def check_seconds(name: str, value: float) -> float:
    """Refuse what is not a time to wait.

    Raises:
        UsageError: `value` is not a positive, finite number.
    """
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} is {value!r}, not a positive number of seconds")
    return value


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`lazymem` under the XDG cache folder (XDG Base Directory Specification: a relative value is ignored)."""
    base = environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):
        home = environ.get("HOME", "")
        base = os.path.join(home, ".cache") if home.startswith("/") else "/var/cache"
    return Path(base, "lazymem")


def _unix(text: str, path: str) -> UnixEndpoint:
    if not path or "\0" in path:
        raise UsageError(f"{text!r} names no socket")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise UsageError(f"{text!r}: a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes")
    return UnixEndpoint(path)
