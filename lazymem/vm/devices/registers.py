"""A chip's registers as one dataclass: what is saved, in which order, and which values the chip can be in. Pure.

A chip keeps everything that its behaviour depends on in such a record, so that saving and loading cannot forget a part
of it: the layout, the saved values and the checks all come from the record's fields.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from lazymem.errors import SaveStreamError
from lazymem.vm.devicestate import Field, Layout, State, Value

Record = TypeVar("Record")


def register(size_bytes: int, default: int = 0, *, minimum: int = 0, maximum: int | None = None) -> Any:
    """A field of 1, 2, 4 or 8 bytes. `minimum`, `maximum`: the values that the chip can be in, if not all."""
    limit = (1 << (8 * size_bytes)) - 1 if maximum is None else maximum
    metadata = {"size_bytes": size_bytes, "minimum": minimum, "maximum": limit}
    return dataclasses.field(default=default, metadata=metadata)


def flag(default: bool = False) -> Any:
    """A field that is 0 or 1."""
    return register(1, int(default), maximum=1)


def layout_of(parts: type | tuple[tuple[str, type], ...], name: str, version: int, instance: int = 0) -> Layout:
    """The layout of one record type's fields, or of several parts, each with a prefix for its names."""
    named = (("", parts),) if isinstance(parts, type) else parts
    fields = tuple(
        Field(prefix + field.name, field.metadata["size_bytes"])
        for prefix, record in named
        for field in dataclasses.fields(record)
    )
    return Layout(name, version, fields, instance)


def values_of(record: object, prefix: str = "") -> dict[str, Value]:
    """Every field's value, by name."""
    return {prefix + field.name: getattr(record, field.name) for field in dataclasses.fields(record)}  # type: ignore[arg-type]


def record_from(record: type[Record], state: State, prefix: str = "") -> Record:
    """A new record with the values of `state`.

    Raises:
        SaveStreamError: a value is missing, of the wrong type, or none that the chip can be in.
    """
    values: dict[str, int] = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        name = prefix + field.name
        value = state.get(name)
        lowest, highest = field.metadata["minimum"], field.metadata["maximum"]
        if not isinstance(value, int) or not lowest <= value <= highest:
            raise SaveStreamError(f"device state: {name} cannot be {value!r} (only {lowest} to {highest})")
        values[field.name] = value
    return record(**values)
