"""What a HELLO is answered with: the snapshot's WELCOME, or the reason why there is none."""

from __future__ import annotations

from lazymem.snapshot.reader import SnapshotReader
from lazymem.wire.connection import negotiate
from lazymem.wire.messages import WIRE_VERSION, Capability, Error, ErrorCode, Hello, Limits, Welcome
from lazymem_server.catalog import Published
from lazymem_server.ending import SessionEnd
from lazymem_server.limits import ServerLimits


def find_published(hello: Hello, published: Published) -> tuple[str, SnapshotReader]:
    """Name and snapshot that the client asks for.

    Raises:
        SessionEnd: it speaks another version, or there is no such snapshot; with the ERROR that tells it so.
    """
    if negotiate(hello) is None:
        spoken = f"this server speaks wire version {WIRE_VERSION}, the client {hello.version_min}"
        raise SessionEnd("wrong version", Error(0, ErrorCode.UNSUPPORTED_VERSION, f"{spoken}: update the older one"))
    found = published.find(hello.name)
    if found is None:
        text = published.refusal(hello.name)
        raise SessionEnd(text, Error(0, ErrorCode.NO_SUCH_SNAPSHOT, text))
    return found


def welcome_to(
    name: str, reader: SnapshotReader, limits: ServerLimits, capabilities: Capability, working_set_bytes: int
) -> Welcome:
    """The WELCOME to a snapshot that `find_published` found."""
    return Welcome(
        version=WIRE_VERSION,
        capabilities=capabilities,
        limits=Limits(limits.max_request_pages, limits.max_request_ranges, limits.max_requests),
        name=name,
        identity=reader.identity,
        ram_bytes=reader.ram_bytes,
        hashed=reader.hashed,
        manifest=reader.manifest_bytes,
        vmstate_bytes=reader.vmstate.size_bytes,
        working_set_bytes=working_set_bytes,
    )
