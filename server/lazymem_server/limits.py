"""What one client may cost the server, and all of them together. Each bound with its reason.

The worst case of memory is `max_clients` times (`max_unsent_bytes` + one answer step of up to 1 MiB + a thread + open
requests), 450 MiB, with `--learn` another MiB a client, with TLS 0.2 MiB for records and OpenSSL's state; what a
well-behaved client costs is a thread and a buffer of `demand_frame_pages`, some 200 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Seconds, bytes, pages and counts. Tests shrink them; the defaults are the server's."""

    max_clients: int = 256
    """Connections at a time; a mount takes two, and a third for guesses around demands. A service may open 1024 files
    by default, and each costs one."""

    max_clients_per_host: int = 64
    """So that one host cannot take all places. Connections over Unix sockets count as one host."""

    handshake_seconds: float = 10.0
    """From accept to a whole HELLO: ten round trips over the worst link; silence until then costs a place. With TLS as
    long again, for its handshake."""

    max_handshakes: int = 128
    """TLS handshakes at a time, before a client is one of `max_clients`: as many as come from the kernel at once
    (`BACKLOG`), some 100 KiB each. Beyond it the oldest of the host that has most of them goes."""

    idle_seconds: float = 60.0
    """Silence after which the client is asked whether it lives (PING). A guest that has all its pages is silent."""

    pong_seconds: float = 30.0
    """How long the answer may take before the client counts as gone."""

    send_seconds: float = 60.0
    """How long `send_bytes` may take to leave: slower than 1 KiB/s is no link that a guest could run on."""

    send_bytes: int = 64 * 1024
    """Handed to the socket at a time; what a demand may have to wait behind in this process (0.5 ms at 1 Gb/s). Less on
    slow links, as the next one."""

    socket_unsent_bytes: int = 64 * 1024
    """TCP_NOTSENT_LOWAT: what the kernel may hold beyond what the link has room for. It cannot be overtaken there. Less
    on slow links (`pace.unsent_bytes_at`)."""

    max_unsent_bytes: int = 512 * 1024
    """Answers waiting for a slow client. Beyond it, its requests are not even read."""

    max_background_unsent_bytes: int = 128 * 1024
    """Guessed pages are made only while less than this waits: two sends, so that the link never runs dry."""

    max_requests: int = 128
    """Open requests of a client: a guest's vCPUs and the kernel's 12 background slots fit many times."""

    max_request_ranges: int = 128
    """Ranges a request; with `max_requests` at most 16384 ranges, 2 MB of records, a client."""

    max_request_pages: int = 16384
    """Pages a request: 64 MiB, what a prefetcher plans ahead. It bounds time, not memory: answers are made as they
    leave."""

    max_cold_reads: int = 4
    """Disk reads of a client that wait at a time, one of them for guessed pages; enough for an SSD to overlap."""

    max_threads: int = 32
    """Disk reads of all clients that wait at a time."""

    demand_frame_pages: int = 32
    """Pages of one PAGES frame that answers a demand: 128 KiB, the kernel's largest FUSE read by default. Fewer on slow
    links (`pace.frame_pages_at`)."""

    cold_read_pages: int = 64
    """Read from a disk at a time for guessed pages: 256 KiB; a seek costs more than the transfer below that."""

    farewell_seconds: float = 1.0
    """For a dropped client to take the frame that says why; the socket closes in order only if it reads it."""

    max_farewells: int = 64
    """Dropped clients that are told why at a time. Each keeps a descriptor; a crowd beyond is closed without a word."""

    goodbye_seconds: float = 5.0
    """For open requests when the server ends; clients come back by themselves."""
