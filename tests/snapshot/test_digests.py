"""The digest tree, against a second way to compute it."""

from __future__ import annotations

import struct

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from lazymem.digests import (
    DIGEST_BYTES,
    LEAF_PAGES,
    ZERO_PAGE_DIGEST,
    TreeShape,
    leaf_digest,
    leaf_matches,
    page_digest,
    root_digest,
    zero_marks,
)
from lazymem.pages import PAGE_SIZE


def test_the_definitions() -> None:
    """Fixed for ever: snapshots on disks depend on them."""
    page = bytes(range(256)) * 16
    assert page_digest(page) == blake3(page).digest()[:16]
    assert page_digest(bytes(PAGE_SIZE)) == ZERO_PAGE_DIGEST
    leaf = page_digest(page) * 3
    assert leaf_digest(leaf) == blake3(leaf, derive_key_context="lazymem 2026 digest tree leaf").digest()[:16]
    upper = leaf_digest(leaf) * 2
    text = struct.pack("<QI", 5 * PAGE_SIZE, PAGE_SIZE) + upper
    assert (
        root_digest(5 * PAGE_SIZE, upper) == blake3(text, derive_key_context="lazymem 2026 digest tree root").digest()
    )


def test_the_levels_cannot_be_taken_for_each_other() -> None:
    data = bytes(range(256)) * 16
    assert len({page_digest(data), leaf_digest(data), root_digest(PAGE_SIZE, data)[:16]}) == 3


@given(pages=st.integers(1, 3000))
def test_the_shape(pages: int) -> None:
    shape = TreeShape(pages * PAGE_SIZE)
    per_leaf = [shape.leaf_pages(leaf) for leaf in range(shape.leaves)]
    assert sum(per_leaf) == shape.pages == pages
    assert all(count == LEAF_PAGES for count in per_leaf[:-1])
    assert 1 <= per_leaf[-1] <= LEAF_PAGES
    assert shape.file_bytes == (pages + shape.leaves) * DIGEST_BYTES
    assert shape.upper_offset == pages * DIGEST_BYTES


def test_mounting_64_gib_takes_one_mib_of_digests() -> None:
    assert TreeShape(64 << 30).upper_bytes == 1 << 20


@pytest.mark.parametrize("size", [0, -4096, 1, 4097])
def test_sizes_that_no_ram_has(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        TreeShape(size)


@given(leaf=st.integers(0, 3), bit=st.integers(0, 8 * LEAF_PAGES * DIGEST_BYTES - 1))
def test_one_bit_of_a_leaf_is_noticed(leaf: int, bit: int) -> None:
    leaves = [bytes([number]) * (LEAF_PAGES * DIGEST_BYTES) for number in range(4)]
    upper = b"".join(leaf_digest(digests) for digests in leaves)
    assert leaf_matches(upper, leaf, leaves[leaf])
    altered = bytearray(leaves[leaf])
    altered[bit // 8] ^= 1 << bit % 8
    assert not leaf_matches(upper, leaf, bytes(altered))
    assert not leaf_matches(upper, (leaf + 1) % 4, leaves[leaf])


@given(st.lists(st.booleans(), max_size=300), st.integers(1, 15))
def test_zero_pages_are_told_by_whole_digests(zeros: list[bool], shared: int) -> None:
    """A digest that begins like a zero page's, or in which that one stands across a border, is another one."""
    other = ZERO_PAGE_DIGEST[:shared] + bytes([ZERO_PAGE_DIGEST[shared] ^ 1]) + ZERO_PAGE_DIGEST[: 15 - shared]
    digests = b"".join(ZERO_PAGE_DIGEST if zero else other for zero in zeros)
    assert list(zero_marks(digests)) == list(map(int, zeros))


@given(
    parts=st.lists(
        st.one_of(
            st.integers(1, 300).map(lambda count: ZERO_PAGE_DIGEST * count),
            st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES),
            # The bytes of a zero page's digest where none begins.
            st.integers(1, DIGEST_BYTES - 1).map(lambda at: ZERO_PAGE_DIGEST[at:] + ZERO_PAGE_DIGEST[:at]),
            st.integers(1, DIGEST_BYTES - 1).map(
                lambda at: bytes(DIGEST_BYTES - at) + ZERO_PAGE_DIGEST + bytes(at)  # over a border of two others
            ),
        ),
        max_size=40,
    )
)
def test_zero_pages_in_long_runs_and_what_only_looks_like_them(parts: list[bytes]) -> None:
    digests = b"".join(parts)
    found = [digests[at : at + DIGEST_BYTES] == ZERO_PAGE_DIGEST for at in range(0, len(digests), DIGEST_BYTES)]
    assert list(zero_marks(digests)) == list(map(int, found))
    assert zero_marks(memoryview(bytearray(digests))) == zero_marks(digests)
