"""`docs/wire.md` says what the code does: its tables are read and compared."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path

import pytest

from lazymem.snapshot import manifest, workingset
from lazymem.wire import frame, limits
from lazymem.wire.frame import RULES, FrameType, Role
from lazymem.wire.messages import Capability, Encoding, ErrorCode, FetchFlag, Level, PublishedFile
from lazymem.wire.states import MOVES, Move, State

DOCUMENT = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")


def table(*header: str) -> list[list[str]]:
    """The rows of the table whose header starts with these columns."""
    lines = iter(DOCUMENT.splitlines())
    for line in lines:
        if cells(line)[: len(header)] == list(header):
            assert next(lines).startswith("| ---")
            rows: list[list[str]] = []
            for row in lines:
                if not row.startswith("|"):
                    return rows
                rows.append(cells(row))
            return rows
    raise AssertionError(f"docs/wire.md has no table with {header}")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []


def test_the_header() -> None:
    rows = table("offset", "bytes", "field")
    assert f"(`{frame.HEADER.format}`)" in DOCUMENT
    assert sum(int(row[1]) for row in rows) == frame.HEADER.size == 16
    at = 0
    for row in rows:
        assert int(row[0]) == at
        at += int(row[1])


def test_the_types() -> None:
    ids = {True: "yes", False: "no", None: "either"}
    expected = []
    for frame_type in FrameType:
        rule = RULES[frame_type]
        sender = "both" if len(rule.senders) == 2 else next(iter(rule.senders)).value
        expected.append(
            [
                str(frame_type.value),
                frame_type.name,
                sender,
                ids[rule.has_id],
                f"0x{rule.flags:02x}",
                str(rule.min_bytes),
                str(rule.max_bytes),
            ]
        )
    assert [row[:7] for row in table("number", "type", "sender")] == expected


def test_the_payload_structures() -> None:
    written = {row[1]: re.findall(r"`(<\w+)`", row[7]) for row in table("number", "type", "sender")}
    structures = {
        FrameType.HELLO: frame.HELLO,
        FrameType.WELCOME: frame.WELCOME,
        FrameType.FETCH: frame.RANGE,
        FrameType.PAGES: frame.PAGES,
        FrameType.FETCH_DIGESTS: frame.FETCH_DIGESTS,
        FrameType.DIGESTS: frame.DIGESTS,
        FrameType.READ_FILE: frame.READ_FILE,
        FrameType.ERROR: frame.ERROR,
        FrameType.STORE_FILE: frame.STORE_FILE,
        FrameType.PACKED: frame.PACKED,
    }
    assert written == {
        frame_type.name: [structures[frame_type].format] if frame_type in structures else [] for frame_type in FrameType
    }


@pytest.mark.parametrize(
    ("column", "enumeration"),
    [("encoding", Encoding), ("level", Level), ("file", PublishedFile), ("code", ErrorCode)],
)
def test_the_enumerations(column: str, enumeration: type[IntEnum]) -> None:
    assert {row[1]: int(row[0]) for row in table(column, "name")} == {
        member.name: member.value for member in enumeration
    }


def test_the_capabilities() -> None:
    known = [capability for capability in Capability if capability]
    assert {row[1]: 1 << int(row[0]) for row in table("bit", "name")} == {
        capability.name: capability.value for capability in known
    }


def test_the_flags() -> None:
    assert (FetchFlag.BACKGROUND, FetchFlag.WANT_DIGESTS) == (1, 2)
    assert (frame.FINAL, frame.WITH_DIGESTS) == (1, 2)


def spoken(move: FrameType | Move) -> str:
    return move.name if isinstance(move, FrameType) else move.value


def test_the_states() -> None:
    written: dict[tuple[str, str, str], str] = {}
    for side, state, sends, then in table("side", "state", "sends"):
        for name in sends.split(", "):
            written[side, state, name] = then
    expected = {
        (role.value, state.value, spoken(move)): then.value
        for role in Role
        for state in State
        for move, then in MOVES[role][state].items()
    }
    assert written == expected


def test_the_limits() -> None:
    for name, value, reason in table("limit", "value", "reason"):
        assert getattr(limits, name) == int(value)
        assert reason
    written = {row[0] for row in table("limit", "value", "reason")}
    derived = {"MAX_PAGE_DATA_BYTES", "MAX_LEAF_BYTES", "MAX_DIGESTS_BYTES"}
    local = {"MAX_FILE_OFFSET", "MAX_UNREAD_BYTES"}
    assert written == {name for name in vars(limits) if name.startswith("MAX_")} - derived - local


def test_limits_that_two_rooms_share() -> None:
    assert limits.MAX_MANIFEST_BYTES == manifest.MAX_MANIFEST_BYTES
    assert limits.MAX_PAGES * 4096 == manifest.MAX_RAM_BYTES
    assert limits.MAX_STORED_BYTES == workingset.MAX_BYTES
