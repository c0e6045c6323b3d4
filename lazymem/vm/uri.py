"""How QEMU spells the places of save streams: file:PATH, tcp:HOST:PORT, unix:PATH. Pure; `transport` opens them."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from lazymem.errors import MonitorError


class FileUri(Struct, frozen=True):
    path: Path

    def __str__(self) -> str:
        return f"file:{self.path}"


class TcpUri(Struct, frozen=True):
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:{self.host}:{self.port}"


class UnixUri(Struct, frozen=True):
    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


Uri = FileUri | TcpUri | UnixUri


def parse_uri(text: str) -> Uri:
    """As QEMU spells them.

    Raises:
        MonitorError: another kind, or a malformed one.
    """
    kind, _, rest = text.partition(":")
    if kind == "file" and rest:
        return FileUri(Path(rest))
    if kind == "unix" and rest:
        return UnixUri(Path(rest))
    if kind == "tcp":
        host, colon, port = rest.rpartition(":")
        if colon and port.isascii() and port.isdigit() and int(port) < 1 << 16:
            return TcpUri(host.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port))
    raise MonitorError(f"{text!r} is no place for a save stream: use file:PATH, tcp:HOST:PORT or unix:PATH")
