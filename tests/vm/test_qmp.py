"""QMP's messages: cutting what a client sends into commands, checking them, and how errors read. No sockets."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymem.vm.qmp import (
    MAX_COMMAND_BYTES,
    Framer,
    QmpError,
    Signature,
    answer,
    check,
    error_answer,
    event,
    greeting,
    parse,
    request_id,
)

# Those that are all of UTF-8. To look them up in Python's codec, as Hypothesis does by default, takes seconds.
characters = st.characters(exclude_categories=["Cs"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(characters),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(characters), inner, max_size=4),
    max_leaves=12,
)
commands = st.dictionaries(st.text(characters, min_size=1), json_values, max_size=4)


@given(
    st.lists(st.tuples(commands, st.sampled_from(["", "\n", "\r\n", "  "]), st.booleans()), max_size=5),
    st.lists(st.integers(1, 100), min_size=1, max_size=8),
)
def test_commands_come_out_whole_however_they_are_cut(
    sent: list[tuple[dict[str, object], str, bool]], pieces: list[int]
) -> None:
    """Cut into pieces of these lengths, over and over."""
    text = "".join(json.dumps(c, indent=2 if pretty else None, ensure_ascii=pretty) + end for c, end, pretty in sent)
    raw = text.encode("utf-8", "surrogatepass")
    framer, found, at = Framer(), [], 0
    for length in itertools.cycle(pieces):
        if at >= len(raw):
            break
        found += framer.feed(raw[at : at + length])
        at += length
    assert [json.loads(one) for one in found] == [command for command, _, _ in sent]


@given(st.binary(max_size=300))
def test_noise_never_crashes_and_the_next_line_is_read(noise: bytes) -> None:
    framer = Framer()
    for text in framer.feed(noise):
        try:
            parse(text)
        except QmpError:
            continue
    # However deep the noise opened brackets and strings, closing them all reads the next command afresh.
    closing = b'"\n' + b"]" * (noise.count(b"[") + noise.count(b"{") + 1) + b"\n"
    framer.feed(closing)
    assert framer.feed(b'\n{"execute": "stop"}')[-1:] == [b'{"execute": "stop"}']


def test_overlong() -> None:
    framer = Framer()
    framer.feed(b'{"x": "' + b"a" * MAX_COMMAND_BYTES)
    assert framer.overlong
    framer = Framer()
    framer.feed(b'{"x": 1}' * MAX_COMMAND_BYTES)
    assert not framer.overlong


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "JSON parse error"),
        (b"\xff\xfe", "JSON parse error"),
        (b"[" * 5000, "JSON parse error"),
        (b"[1]", "must be a JSON object"),
        (b"{}", "lacks member 'execute'"),
        (b'{"execute": 1}', "'execute' must be a string"),
        (b'{"execute": "stop", "arguments": 3}', "'arguments' must be an object"),
        (b'{"execute": "stop", "arg": {}}', "member 'arg' is unexpected"),
    ],
)
def test_what_is_no_command_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(QmpError, match=reason) as caught:
        parse(text)
    assert caught.value.kind == "GenericError"


def test_a_command_is_read() -> None:
    request = parse(b'{"execute": "migrate", "arguments": {"uri": "file:x"}, "id": [1, "a"]}')
    assert (request.command, request.arguments, request.request_id) == ("migrate", {"uri": "file:x"}, [1, "a"])
    assert not parse(b'{"execute": "stop"}').has_id
    assert parse(b'{"execute": "stop", "id": null}').has_id


def test_the_id_of_a_refused_command_comes_back() -> None:
    assert request_id(b'{"id": 7}') == (7, True)
    assert request_id(b"[]") == (None, False)
    assert request_id(b"{") == (None, False)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "Parameter 'uri' is missing"),
        ({"uri": 5}, "Invalid parameter type for 'uri', expected: string"),
        ({"uri": "x", "detach": 1}, "Invalid parameter type for 'detach', expected: boolean"),
        ({"uri": "x", "count": True}, "Invalid parameter type for 'count', expected: integer"),
        ({"uri": "x", "other": 1}, "Parameter 'other' is unexpected"),
    ],
)
def test_arguments_are_checked_as_qemu_does(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(QmpError, match=reason):
        check(arguments, Signature({"uri": str}, {"detach": bool, "count": int}))
    check({"uri": "x", "detach": True, "count": 3}, Signature({"uri": str}, {"detach": bool, "count": int}))


def test_lines() -> None:
    assert json.loads(greeting({"qemu": {}, "package": "p"})) == {
        "QMP": {"version": {"qemu": {}, "package": "p"}, "capabilities": []}
    }
    assert json.loads(answer({}, 1, True)) == {"return": {}, "id": 1}
    assert json.loads(answer([], None, False)) == {"return": []}
    refused = json.loads(error_answer(QmpError("no", "CommandNotFound"), None, True))
    assert refused == {"error": {"class": "CommandNotFound", "desc": "no"}, "id": None}
    stop = json.loads(event("STOP", {}, 1_700_000_000_123_456_789))
    assert stop == {"event": "STOP", "timestamp": {"seconds": 1_700_000_000, "microseconds": 123_456}}
    for line in (greeting({}), answer({}, 1, True), event("X", {"a": "\n"}, 0)):
        assert line.endswith(b"\r\n")
        assert line.count(b"\n") == 1
