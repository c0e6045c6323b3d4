"""What the store has done since the mount: one frozen record."""

from __future__ import annotations

from msgspec import Struct


class StoreStatistics(Struct, frozen=True):
    """Pages as of now; counts since the store was opened.

    `held_pages`: in the cache, by this mount or found there; those that another mount puts there meanwhile are not in
    it. `reads_at_hand`: reads answered without waiting for disk or source. `dropped_pages`: cached pages that did not
    have their digest, dropped and fetched again. `shed_pages`: cached pages given up for room on the disk.
    `waiting_writes`: of the guest's, now, for room or for a disk that refuses them. `reserved_bytes`: room beside the
    written pages that is still theirs to take. `candidates_used`, `candidates_refused`: of pages that came before the
    guest stood, those that turned out to be right, and those that were fetched after all.
    """

    total_pages: int
    held_pages: int
    written_pages: int
    reads: int
    reads_at_hand: int
    demanded_pages: int
    writes: int
    merged_pages: int
    dropped_pages: int
    shed_pages: int = 0
    waiting_writes: int = 0
    reserved_bytes: int = 0
    candidates_used: int = 0
    candidates_refused: int = 0
