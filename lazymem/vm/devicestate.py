"""How a device says what its state is: a layout of named fields, and plain values for them. Pure.

The save stream writes the values by the layout, big-endian as QEMU does, and describes them in its JSON part; the
device itself knows nothing of streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

Value = int | bytes
State = Mapping[str, Value]


class Field(Struct, frozen=True):
    """One field: an unsigned integer of 1, 2, 4 or 8 bytes (value: int), or a buffer of any size (value: bytes)."""

    name: str
    size_bytes: int
    buffer: bool = False


class Layout(Struct, frozen=True):
    """A device's section in the save stream: its name (QEMU's idstr), version and fields, in stream order."""

    name: str
    version: int
    fields: tuple[Field, ...]
    instance: int = 0


class Stateful(Protocol):
    """A device (or the CPU) whose state is saved."""

    @property
    def layout(self) -> Layout: ...

    def state(self) -> State:
        """Every field's value; reading it changes nothing. Only while the machine is stopped."""
        ...

    def load_state(self, state: State) -> None:
        """Take over values that the stream's reader has checked for name, size and version.

        Raises:
            SaveStreamError: a value that this device cannot be in.
        """
        ...
