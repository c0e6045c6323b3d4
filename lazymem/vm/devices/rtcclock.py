"""The calendar of an MC146818 as its ten register bytes: encoding, decoding, alarm. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
CENTURY = 0x32
TIME_REGISTERS = frozenset({SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY})

BINARY, HOURS_24 = 0x04, 0x02
"""Bits of register B: how the bytes are to be read."""

_PM = 0x80
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST_SECOND = int((datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC) - _EPOCH).total_seconds())
"""Two digits of century end here; the calendar starts again at 1970."""


def encode(epoch_seconds: int, register_b: int) -> dict[int, int]:
    """The time registers at a moment (seconds since 1970, UTC)."""
    moment = _EPOCH + timedelta(seconds=epoch_seconds % (LAST_SECOND + 1))
    century, year = divmod(moment.year, 100)
    plain = {
        SECONDS: moment.second,
        MINUTES: moment.minute,
        WEEKDAY: moment.isoweekday() % 7 + 1,
        DAY: moment.day,
        MONTH: moment.month,
        YEAR: year,
        CENTURY: century,
    }
    encoded = {register: _encode_number(value, register_b) for register, value in plain.items()}
    encoded[HOURS] = _encode_hours(moment.hour, register_b)
    return encoded


def maybe_decode(registers: Mapping[int, int], register_b: int) -> int | None:
    """Seconds since 1970 of the time registers, or None where they name no moment from 1970 on. The day of the week
    is not looked at, as on the chip."""
    number = {register: _decode_number(registers[register], register_b) for register in TIME_REGISTERS - {HOURS}}
    try:
        moment = datetime(
            number[CENTURY] * 100 + number[YEAR],
            number[MONTH],
            number[DAY],
            _decode_hours(registers[HOURS], register_b),
            number[MINUTES],
            number[SECONDS],
            tzinfo=UTC,
        )
    except ValueError:
        return None
    seconds = int((moment - _EPOCH).total_seconds())
    return seconds if seconds >= 0 else None


def alarm_between(first: int, last: int, alarm: Mapping[int, int], register_b: int) -> bool:
    """Whether the alarm's time of day comes in the seconds after `first` up to `last`. 0xC0 and above: any value."""
    wanted = []
    for register, decode in (
        (HOURS_ALARM, _decode_hours),
        (MINUTES_ALARM, _decode_number),
        (SECONDS_ALARM, _decode_number),
    ):
        value = alarm[register]
        wanted.append(None if value >= 0xC0 else decode(value, register_b))
    # A day has every time of day: no span is worth more looking.
    for second in range(max(first, last - 86_400) + 1, last + 1):
        fields = (second // 3600 % 24, second // 60 % 60, second % 60)
        if all(want is None or want == have for want, have in zip(wanted, fields, strict=True)):
            return True
    return False


def _encode_number(value: int, register_b: int) -> int:
    return value if register_b & BINARY else value // 10 << 4 | value % 10


def _decode_number(value: int, register_b: int) -> int:
    return value if register_b & BINARY else (value >> 4) * 10 + (value & 0xF)


def _encode_hours(hour: int, register_b: int) -> int:
    if register_b & HOURS_24:
        return _encode_number(hour, register_b)
    return _encode_number((hour + 11) % 12 + 1, register_b) | (_PM if hour >= 12 else 0)


def _decode_hours(value: int, register_b: int) -> int:
    if register_b & HOURS_24:
        return _decode_number(value, register_b)
    return _decode_number(value & ~_PM, register_b) % 12 + (12 if value & _PM else 0)
