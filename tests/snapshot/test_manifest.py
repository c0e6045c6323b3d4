"""manifest.json comes from outside: what is good is read as written, anything else is one clear error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lazymem.errors import SnapshotError
from lazymem.pages import PAGE_SIZE
from lazymem.snapshot.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_RAM_BYTES,
    Block,
    Emulator,
    Manifest,
    Parent,
    VmState,
    parse,
)

GOOD = Manifest(
    emulator=Emulator("qemu", "7.2", "pc-i440fx-7.2", "qemu64", ("-m", "512M")),
    blocks=(Block("pc.ram", "pc.ram", 1 << 20),),
    ram_id="00" * 16,
    ram_root="11" * 32,
    vmstate=VmState("vmstate", 5000, "22" * 32),
    created="2026-01-02T03:04:05Z",
    disks_handled=True,
    pause_seconds=0.25,
    extra={"note": "x"},
)


def test_round_trip() -> None:
    assert parse(GOOD.to_json()) == GOOD
    bare = Manifest(Emulator("x", "1"), GOOD.blocks, GOOD.ram_id, GOOD.ram_root, None)
    assert parse(bare.to_json()) == bare


def test_sums_are_of_the_identity() -> None:
    """Who verified pages by other sums has them in another cache. A delta has none."""
    summed = replace(GOOD, ram_sums="33" * 32)
    assert parse(summed.to_json()) == summed
    assert json.loads(GOOD.to_json())["version"] < json.loads(summed.to_json())["version"]
    assert len({GOOD.identity, summed.identity, replace(GOOD, ram_sums="44" * 32).identity}) == 3
    delta = replace(summed, parent=Parent("55" * 32))
    assert parse(delta.to_json()) == replace(delta, ram_sums=None)
    assert delta.identity == GOOD.identity


def document(**changes: Any) -> bytes:
    return json.dumps({**json.loads(GOOD.to_json()), **changes}).encode()


def block(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "pc.ram", "file": "pc.ram", "size": 1 << 20, "page_size": PAGE_SIZE, **changes}]


@pytest.mark.parametrize("name", ["../pc.ram", "/etc/passwd", "a/b", "..", ".", "", "pc\0ram"])
def test_a_path_outside_the_folder(name: str) -> None:
    with pytest.raises(SnapshotError, match="outside the snapshot's folder"):
        parse(document(blocks=block(file=name)))
    with pytest.raises(SnapshotError, match="outside the snapshot's folder"):
        parse(document(vmstate={"file": name, "size": 1, "digest": "22" * 32}))


BAD = {
    "empty": (b"", "not JSON"),
    "cut": (GOOD.to_json()[:-20], "not JSON"),
    "not UTF-8": (b"\xff\xfe", "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "a list": (b"[]", "format"),
    "another format": (document(format="other"), "format"),
    "a newer version": (document(version=4), "version 4"),
    "sums that are none": (document(version=3, ram_sums="33"), "ram_sums"),
    "no sums": (document(version=3), "ram_sums"),
    "too large": (b" " * (MAX_MANIFEST_BYTES + 1), "more than"),
    "a block twice": (document(blocks=block() * 2), "twice"),
    "no pc.ram": (document(blocks=block(name="pc.bios")), "no block pc.ram"),
    "no blocks": (document(blocks=[]), "no block pc.ram"),
    "odd size": (document(blocks=block(size=4097)), "4097"),
    "no size": (document(blocks=block(size=0)), "0 bytes"),
    "negative size": (document(blocks=block(size=-4096)), "-4096"),
    "immense": (document(blocks=block(size=MAX_RAM_BYTES + PAGE_SIZE)), "sane"),
    "size a text": (document(blocks=block(size="1")), "'1'"),
    "size a truth": (document(blocks=block(size=True)), "True"),
    "huge pages": (document(blocks=block(page_size=2 << 20)), "pages of"),
    "root too short": (document(ram_root="11" * 31), "ram_root"),
    "root in capitals": (document(ram_root="AA" * 32), "ram_root"),
    "root with spaces": (document(ram_root="11 " * 21 + "1"), "ram_root"),
    "id not hex": (document(ram_id="zz" * 16), "ram_id"),
    "id null": (document(ram_id=None), "None"),
    "emulator a text": (document(emulator="qemu"), "field"),
    "vmstate without size": (document(vmstate={"file": "vmstate", "digest": "22" * 32}), "field"),
    "extra a list": (document(extra=[""]), "object"),
    "NaN": (document(pause_seconds=float("nan")), "not JSON"),
    "half a surrogate pair": (document(blocks=block(file="\ud800")), "surrogate"),
    "blocks null": (document(blocks=None), "field"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_manifests(name: str) -> None:
    text, match = BAD[name]
    with pytest.raises(SnapshotError, match=match):
        parse(text)


@pytest.mark.parametrize("field", ["emulator", "blocks", "ram_id", "ram_root", "vmstate"])
def test_a_missing_field_is_named(field: str) -> None:
    whole = json.loads(GOOD.to_json())
    del whole[field]
    with pytest.raises(SnapshotError, match=field):
        parse(json.dumps(whole).encode())


# Those that are all of UTF-8. To look them up in Python's codec, as Hypothesis does by default, takes seconds.
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)


def test_a_pause_beyond_any_float_is_unknown() -> None:
    assert parse(document(pause_seconds=10**400)).pause_seconds is None


@given(field=st.sampled_from(sorted(json.loads(GOOD.to_json()))), value=_json)
def test_any_value_in_any_field_is_taken_or_refused(field: str, value: object) -> None:
    try:
        manifest = parse(document(**{field: value}))
    except SnapshotError:
        return
    assert parse(manifest.to_json()) == manifest


def test_identity_is_that_of_the_ram() -> None:
    assert GOOD.identity == replace(GOOD, created="later", vmstate=None).identity
    for other in (
        replace(GOOD, ram_root="12" * 32),
        replace(GOOD, ram_id="01" * 16),
        replace(GOOD, blocks=(Block("pc.ram", "pc.ram", 2 << 20),)),
    ):
        assert other.identity != GOOD.identity
    assert len(GOOD.identity) == 32
