"""A decision on the disk: whole or not there, kept by one process, and never one that was cut taken for one."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.errors import BusyError, StoreError
from lazymem.handover import requests
from lazymem.handover.journal import NAME, Journal, default_folder, read


def test_the_last_decision_is_found_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "source") as journal:
        assert journal.found is None
        for number in range(5):
            journal.write("id", f"state{number}", {"number": number})
    with Journal(tmp_path / "j", "source") as journal:
        assert journal.found is not None
        assert (journal.found.state, journal.found.details) == ("state4", {"number": 4})
    assert read(tmp_path / "j") == journal.found


def test_a_decision_whose_digest_begins_with_a_zero_is_one(tmp_path: Path) -> None:
    """One in 256 does."""
    with Journal(tmp_path / "j", "source") as journal:
        for number in range(3000):
            journal.write("id", "ours", {"number": number})
            slot = (number + 1) % 2 * 16 * 1024
            if (tmp_path / "j" / NAME).read_bytes()[slot] == 0:
                break
        found = read(tmp_path / "j")
    assert found is not None
    assert found.details == {"number": number}


@settings(max_examples=60)
@given(st.integers(0, 16 * 1024 - 1), st.integers(1, 255))
def test_a_write_that_was_cut_leaves_the_decision_before_it(
    tmp_path_factory: pytest.TempPathFactory, kept: int, noise: int
) -> None:
    """Whatever of the second write's slot reached the disk, and whatever stands in the rest of it."""
    folder = tmp_path_factory.mktemp("journal") / "j"
    with Journal(folder, "source") as journal:
        journal.write("id", "first", {})
        before = (folder / NAME).read_bytes()
        journal.write("id", "second", {})
    after = (folder / NAME).read_bytes()
    slot = 0 if after[:16] != before[:16] else 16 * 1024
    torn = after[slot : slot + kept] + bytes([noise]) * (16 * 1024 - kept)
    (folder / NAME).write_bytes(after[:slot] + torn + after[slot + 16 * 1024 :])
    with Journal(folder, "source") as journal:
        assert journal.found is not None
        assert journal.found.state == "first"


def test_a_journal_that_cannot_be_locked_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "told to fail")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreError, match="cannot lock"):
        Journal(tmp_path / "j", "source")


def test_what_is_found_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that the disk refused is still in the kernel's memory, and fsync then says nothing more of it."""

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "told to fail")

    with Journal(tmp_path / "j", "source") as journal:
        journal.write("id", "first", {})
        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", refuse)
            with pytest.raises(StoreError):
                journal.write("id", "second", {})
            journal.close()
            with pytest.raises(StoreError):
                Journal(tmp_path / "j", "source")
    before = (tmp_path / "j" / NAME).read_bytes()
    with Journal(tmp_path / "j", "source") as journal:
        assert journal.found is not None
        assert journal.found.state == "second"
    assert (tmp_path / "j" / NAME).read_bytes() == before


def test_a_request_whose_asker_is_long_gone_is_none(tmp_path: Path) -> None:
    (tmp_path / "request").write_text("reclaim")
    os.utime(tmp_path / "request", (1, 1))
    assert requests.maybe_asked(tmp_path) is None
    assert not (tmp_path / "request").exists()
    (tmp_path / "request").write_text("reclaim")
    assert requests.maybe_asked(tmp_path) == "reclaim"


def test_a_journal_of_which_nothing_is_whole_decides_nothing(tmp_path: Path) -> None:
    """It may have said that the guest was given away: to begin anew would run it twice."""
    with Journal(tmp_path / "j", "source") as journal:
        journal.write("id", "ours", {})
        journal.write("id", "given", {})
    path = tmp_path / "j" / NAME
    data = bytearray(path.read_bytes())
    for slot in (0, len(data) // 2):
        data[slot + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        Journal(tmp_path / "j", "source")


def test_one_process_at_a_time_and_one_side(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "source") as journal:
        journal.write("id", "ours", {})
        with pytest.raises(BusyError):
            Journal(tmp_path / "j", "source")
    with pytest.raises(StoreError, match="the source's of a hand-over"):
        Journal(tmp_path / "j", "destination")


def test_a_folder_that_others_can_write_to_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    (tmp_path / "j").chmod(0o777)
    with pytest.raises(StoreError, match="can write to it"):
        Journal(tmp_path / "j", "source")


def test_a_record_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", "source") as journal, pytest.raises(StoreError, match="more than fit"):
        journal.write("id", "ours", {"options": "x" * 20000})


def test_a_default_folder_is_the_same_for_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert default_folder("send", "/run/qmp") == default_folder("send", "/run/qmp") != default_folder("send", "/run/q")


def test_nobody_who_answers(tmp_path: Path) -> None:
    with pytest.raises(BusyError):
        requests.ask(tmp_path, "take", 0.1)
    assert requests.maybe_asked(tmp_path) is None


def test_what_is_noted_is_read_and_takes_no_decisions_place_that_is_on_the_disk(tmp_path: Path) -> None:
    """A host that crashes finds the one before it, whatever of the note, and of what is written next, came so far."""
    with Journal(tmp_path / "j", "destination") as journal:
        journal.write("id", "asked", {})
        journal.write("id", "promised", {})
        on_the_disk = (tmp_path / "j" / NAME).read_bytes()
        journal.note("id", "mine", {})
        noted = (tmp_path / "j" / NAME).read_bytes()
        found = read(tmp_path / "j")
        assert found is not None
        assert found.state == "mine"
        journal.write("id", "mine", {"ran": True})
    then = (tmp_path / "j" / NAME).read_bytes()
    (promised,) = (slot for slot in _slots_of(on_the_disk) if b'"promised"' in slot)
    for data in (noted, then):
        assert promised in _slots_of(data)
    with Journal(tmp_path / "j", "destination") as journal:
        assert journal.found is not None
        assert journal.found.details == {"ran": True}


def _slots_of(data: bytes) -> list[bytes]:
    return [data[: 16 * 1024], data[16 * 1024 :]]
