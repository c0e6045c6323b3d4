"""What a host's answers are made like, by the rates that are seen: simulated links with a clock of their own."""

from __future__ import annotations

import pytest
from lazymem_server.pace import (
    EPOCH_BYTES,
    EPOCH_SECONDS,
    LEAST_UNSENT_BYTES,
    MOST_UNSENT_BYTES,
    SLOW_WIRE_BYTES_PER_SECOND,
    Pace,
    frame_pages_at,
    unsent_bytes_at,
)

from lazymem.pages import PAGE_SIZE
from lazymem.wire.limits import MAX_FRAME_PAGES

STEP = 256 * 1024
ZSTD = {0: float("inf"), 1: 240e6, 3: 130e6}
RATIO = {0: 1.0, 1: 2.4, 3: 2.6}


def run(pace: Pace, link: float, other: float = float("inf"), megabytes: int = 500, cpu: float = 1.0) -> dict[int, int]:
    """Bulk over a link of so many bytes a second, to a client that takes `other`; how many steps at each level.

    `cpu`: the part of a processor that the server gets.
    """
    now, made = pace._last_at + 100.0, dict.fromkeys(ZSTD, 0)
    for _ in range(megabytes * 4):
        made[pace.level] += 1
        making = STEP / (ZSTD[pace.level] * cpu)
        now += max(STEP / min(link * RATIO[pace.level], other), making)
        pace.note(now, STEP, int(STEP / RATIO[pace.level]), making)
    return made


@pytest.mark.parametrize(
    ("link", "level"), [(5e5, 3), (1e6, 3), (12.5e6, 3), (125e6, 1), (1e9, 0), (5e9, 0)], ids=lambda value: f"{value:g}"
)
def test_the_level_that_suits_the_link(link: float, level: int) -> None:
    made = run(Pace(), link, megabytes=1000)
    assert made[level] >= 0.9 * sum(made.values())


def test_a_slow_client_on_a_fast_link_is_not_made_to_decompress() -> None:
    for client in (55e6, 90e6):
        pace = Pace()
        made = run(pace, 5e9, other=client)
        assert made[0] >= 0.8 * sum(made.values())
        assert not pace.slow


def test_a_busy_server_does_not_take_its_own_slowness_for_the_links() -> None:
    pace = Pace()
    made = run(pace, 125e6, cpu=0.2)
    assert made[0] >= 0.8 * sum(made.values())
    assert not pace.slow


def test_a_slow_link_is_seen_to_be_slow_and_to_be_fast_again() -> None:
    pace = Pace()
    assert not pace.slow
    run(pace, 1e6, megabytes=12)
    assert pace.slow
    run(pace, 5e9, megabytes=1000)
    assert not pace.slow
    assert pace.level == 0


@pytest.mark.parametrize("megabits", [0.1, 1, 3.2, 3.3, 5, 10, 20, 33, 52, 100, 300, 1000, 10_000, 100_000])
def test_a_frame_is_never_longer_than_10_ms_of_the_link_where_one_page_is_not(megabits: float) -> None:
    """Also where none of its pages compresses."""
    link = megabits * 1e6 / 8
    seconds = frame_pages_at(link) * PAGE_SIZE / link
    assert seconds <= 0.01 or frame_pages_at(link) == 1
    assert seconds > 0.005 or frame_pages_at(link) in (1, MAX_FRAME_PAGES), "and not shorter for nothing"
    assert LEAST_UNSENT_BYTES <= unsent_bytes_at(link) <= MOST_UNSENT_BYTES
    assert unsent_bytes_at(link) / link <= 0.01 or unsent_bytes_at(link) == LEAST_UNSENT_BYTES


@pytest.mark.parametrize(("link", "pages"), [(1.25e6, 3), (12.5e6, 30), (125e6, 256), (5e9, 256)])
def test_frames_follow_the_rate_that_is_seen(link: float, pages: int) -> None:
    pace = Pace()
    run(pace, link)
    assert 1 <= pace.frame_pages <= MAX_FRAME_PAGES
    assert pace.frame_pages == pytest.approx(pages, rel=0.35)
    assert pace.unsent_bytes == unsent_bytes_at(pace._carried)


@pytest.mark.parametrize(("demanded", "pages"), [(0, 3), (128 * 1024, 32)])
def test_a_trickle_of_guesses_beside_demands_does_not_make_their_frames_short(demanded: int, pages: int) -> None:
    """While a guest demands, a client lets a request of guesses pass each 50 ms, whatever the link is."""
    pace, now = Pace(), 100.0
    for _ in range(2000):
        now += 0.05
        for _ in range(10):
            pace.note_demand(demanded)
        pace.note(now, 128 * 1024, 64 * 1024, 0.001)
    assert pages <= pace.frame_pages <= 3 * pages


def test_fast_links_are_left_as_they_were() -> None:
    """Demands of the kernel's largest read in one frame, bulk of a MiB, and 64 KiB a time for the socket."""
    for link in (125e6, 5e9):
        pace = Pace()
        run(pace, link)
        assert pace.frame_pages >= 128
        assert pace.unsent_bytes == MOST_UNSENT_BYTES


def test_a_pause_is_no_slowness() -> None:
    pace = Pace(level=0)
    now = 0.0
    for _ in range(20):
        for _ in range(EPOCH_BYTES // STEP - 1):
            now += EPOCH_SECONDS / 10
            pace.note(now, STEP, STEP, 0.0)
        now += 2.0
    assert (pace.level, pace.slow) == (0, False)


def test_a_trial_that_a_pause_ends_changes_nothing() -> None:
    pace = Pace()
    for now in range(0, 1000, 2):
        pace.note(float(now), 0, 0, 0.0)
        for step in range(1, 6):
            pace.note(now + step * EPOCH_SECONDS / 4, EPOCH_BYTES // 4, EPOCH_BYTES // 4, 0.0)
    assert pace.level > 0


def test_trials_become_rare() -> None:
    made = run(Pace(), 12.5e6, megabytes=2000)
    assert made[0] == 0, "a slow link has none"
    made = run(Pace(), 125e6, megabytes=4000)
    assert made[0] <= 0.1 * sum(made.values())


def test_where_there_is_no_link_nothing_is_compressed() -> None:
    made = run(Pace(level=0), 5e9)
    assert made[0] == sum(made.values())


def test_a_peer_on_this_host_is_supposed_to_have_no_link() -> None:
    made = run(Pace.of_this_host(), 5e9)
    assert made[0] == sum(made.values())
    made = run(Pace.of_this_host(), 12.5e6, megabytes=2000)
    assert made[0] * STEP <= 2 * SLOW_WIRE_BYTES_PER_SECOND * EPOCH_SECONDS, "a relay is seen before an epoch is over"


def test_bursts_of_a_slow_link_are_no_fast_link() -> None:
    """A relay's or a socket's buffer takes an epoch at once, and the next one waits for it."""
    pace = Pace()
    now = 0.0
    for number in range(400):
        now += EPOCH_SECONDS * (1.0 if number % 2 else 4.0) * STEP / EPOCH_BYTES * 2
        pace.note(now, STEP, STEP // 2, 0.0)
    assert pace.slow
    assert pace.level == 3
