"""What the two ends say: there and back in any pieces; and nonsense, which is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazymem.errors import RemoteProtocolError
from lazymem.handover import messages
from lazymem.handover.messages import Receiver, encode

ALL = [
    messages.Hello(1, "boot", "id"),
    messages.Offer(1, "id", 4096, {"name": "qemu"}, "boot", "/ram", True),
    messages.No("no", unknown=True),
    messages.Clock(1.5),
    messages.Arrived(1 << 40),
    messages.Ready(),
    messages.Received(7),
    messages.Given(2.5),
    messages.Mine(0.1),
    messages.Refused("because"),
    messages.Whole({"pages": 1}),
    messages.Done(),
    messages.Void("why"),
    messages.Ping(),
    messages.Pong(),
]


@given(st.lists(st.integers(1, 50), max_size=40))
def test_in_any_pieces(cuts: list[int]) -> None:
    data = b"".join(encode(message) for message in ALL)
    receiver = Receiver()
    found = []
    for cut in [*cuts, len(data)]:
        found += receiver.feed(data[:cut])
        data = data[cut:]
    assert found == ALL


@pytest.mark.parametrize(
    "data",
    [
        (1 << 31).to_bytes(4, "little"),
        (messages.MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"),
        b"\2\0\0\0[]",
        b"\1\0\0\0{",
        b"\x11\0\0\0" + b'{"say":"nothing"}',
        b"\x18\0\0\0" + b'{"say":"done","more":123}',
        b"\x14\0\0\0" + b'{"say":"received"}  ',
        b"\x22\0\0\0" + b'{"say":"received","state_bytes":"x"}',
    ],
)
def test_nonsense(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Receiver().feed(data)


def test_a_page_clients_first_frame_is_never_taken_for_a_receivers() -> None:
    """By its second byte: a HELLO has 16 to 271 bytes."""
    assert {length.to_bytes(4, "little")[1] for length in range(16, 272)} <= {0, 1}
    assert messages.CONTROL[1] > 1
    assert messages.STATE[1] > 1


def test_what_is_too_long_is_not_sent() -> None:
    with pytest.raises(RemoteProtocolError):
        encode(messages.Void("x" * messages.MAX_MESSAGE_BYTES))
    assert len(messages.short("x" * 100000)) == messages.MAX_TEXT
