"""What a snapshot's manifest says about the QEMU that it was made with, as options for the one that resumes it. Pure.

A manifest comes from another host, and QEMU's options can name this host's files, devices and programs. So an option is
repeated by itself only when it is of a kind that cannot, and looks like one of its kind; the others (devices above all)
are named to the user, who repeats them.

One device is repeated: a generation id (vmgenid), with a new id each time. A guest that looks at it learns so that it
goes on from a saved state, which others may go on from, too (docs/vmm.md). One that is handed over is no clone, and
keeps its id, as the device's specification has it for a live migration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from msgspec import Struct

from lazymem.errors import IdentityError, UsageError
from lazymem.snapshot.manifest import Emulator

_ALONE = frozenset({"-nodefaults", "-no-acpi", "-no-hpet"})

_REPEATED = {
    "-smp": r"[a-z0-9=,]+",
    "-vga": r"[a-z0-9-]+",
    "-rtc": r"[A-Za-z0-9=,:T-]+",
    "-global": r"[A-Za-z0-9_.-]+=[A-Za-z0-9_.-]+",
    "-icount": r"(?:shift=)?(?:auto|\d+)(?:,(?:align|sleep)=(?:on|off))*",
}
"""Options that are repeated, with what their values may look like: nothing that could be a path out of this folder."""

_FIXED = ("-smp", "-vga")
"""Of these, what a user may only repeat, not change: a state of other hardware does not load, or crashes its guest."""

_GENERATION = "vmgenid"
_FRESH_GENERATION = ("-device", f"{_GENERATION},guid=auto")

_GUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"

_SWITCH = re.compile(r"[a-z0-9-]+=(?:on|off|auto|split)")
"""Properties of a machine that are carried over. All that name a file or an object take another kind of value."""

_NOT_CARRIED = ("mem-merge=", "dump-guest-core=", "accel=")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_CPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(?:,[+-]?[A-Za-z0-9_.-]+(?:=[A-Za-z0-9_.-]+)?)*")

_ONLY_LOOK = ("check", "enforce")
"""Whether QEMU says, or refuses, that the host lacks a feature: the guest's CPU is the same."""

_SWITCHED = dict.fromkeys(("true", "yes", "y"), "on") | dict.fromkeys(("false", "no", "n"), "off")
"""QEMU's other words for a switch."""

_FEATURE_ALIASES = {
    "sse3": "pni",
    "pclmuldq": "pclmulqdq",
    "sse4-1": "sse4.1",
    "sse4-2": "sse4.2",
    "xd": "nx",
    "ffxsr": "fxsr-opt",
    "i64": "lm",
    "hv-apicv": "hv-avic",
}
"""QEMU's other names for a CPU's features (x86_cpu_initfn in its target/i386/cpu.c), besides _ for -."""

ACCELERATORS = ("kvm", "tcg")


class Recorded(Struct, frozen=True):
    """`words` are ready for QEMU; `left_out` is what the user has to say himself; `accelerator` None: unknown."""

    machine: str
    switches: tuple[str, ...]
    cpu: str | None
    words: tuple[str, ...]
    accelerator: str | None
    left_out: tuple[str, ...]


def read(made_by: Emulator) -> Recorded:
    """
    Raises:
        IdentityError: not made by a QEMU, or by a machine that no QEMU has.
    """
    if made_by.name != "qemu":
        raise IdentityError(
            f"the snapshot was made by {made_by.name}, whose machine QEMU does not have: leave --engine out"
        )
    if made_by.machine is None or not _NAME.fullmatch(made_by.machine):
        raise IdentityError(f"the snapshot's manifest names no machine type of QEMU's: {made_by.machine!r}")
    pairs = list(_pairs(made_by.options))
    words: list[str] = []
    left_out = []
    for option, value in pairs:
        if value is None:
            words += [option] if option in _ALONE else []
        elif re.fullmatch(_REPEATED.get(option, ""), value):
            words += [option, value]
        elif _is_generation(option, value):
            words += _FRESH_GENERATION
        elif option in (*_REPEATED, "-device") or (option == "-m" and "," in value):
            left_out.append(f"{option} {value}")
    return Recorded(
        made_by.machine,
        tuple(_switches(pairs)),
        _cpu(made_by.cpu, pairs),
        tuple(words),
        _accelerator(made_by.options, pairs),
        tuple(left_out),
    )


def check_agrees(recorded: Recorded, machine: str | None, more: Sequence[str]) -> None:
    """Whether the user's own options are those of the snapshot. `machine`: his machine type, no alias, if he named one.

    Raises:
        UsageError: with what the snapshot was made with.
    """
    if machine is not None and machine != recorded.machine:
        raise _disagreement("-machine", machine, recorded.machine)
    cpu = given(more, "-cpu")
    if cpu is not None and recorded.cpu is not None and _features(cpu) != _features(recorded.cpu):
        raise _disagreement("-cpu", cpu, recorded.cpu)
    for option in _FIXED:
        his, its = given(more, option), given(recorded.words, option)
        if his is not None and its is not None and his != its:
            raise _disagreement(option, his, its)


def without(words: Sequence[str], more: Sequence[str]) -> list[str]:
    """`words` without the options that `more` has, too: the user's come once, as he said them."""
    kept: list[str] = []
    own_generation = has_generation(more)
    for option, value in _pairs(words):
        if not own_generation if option == "-device" else not has(more, option) or option == "-global":
            kept += [option] if value is None else [option, value]
    return kept


def missing(recorded: Recorded, more: Sequence[str]) -> list[str]:
    """What the snapshot's guest had that neither we nor the user's options say."""
    said = {f"{option} {value}" for option, value in _pairs(more)}
    return [entry for entry in recorded.left_out if entry not in said]


def given(words: Sequence[str], *options: str) -> str | None:
    """The value of the last of these options in a command line; None where it is not there."""
    return next((value for option, value in reversed(list(_pairs(words))) if option in options), None)


def has(words: Sequence[str], *options: str) -> bool:
    return any(option in options for option, _ in _pairs(words))


def has_generation(words: Sequence[str]) -> bool:
    return any(_is_generation(option, value) for option, value in _pairs(words))


def _is_generation(option: str, value: str | None) -> bool:
    return option == "-device" and (value or "").partition(",")[0].removeprefix("driver=") == _GENERATION


def with_generation(words: Sequence[str], guid: str | None) -> list[str]:
    """`words` with the id that the guest has now where they leave it to QEMU; None: it has none."""
    kept: list[str] = []
    for option, value in _pairs(words):
        if guid is not None and _is_generation(option, value):
            value = f"{_GENERATION},guid={guid}"
        kept += [option] if value is None else [option, value]
    return kept


def maybe_generation(words: Sequence[str]) -> str | None:
    """The id that a command line names, if it is one and not left to QEMU."""
    for option, value in _pairs(words):
        found = re.fullmatch(rf"{_GENERATION},guid=({_GUID})", value or "")
        if option == "-device" and found is not None:
            return found[1]
    return None


def machine_type(value: str) -> str | None:
    """The type in a value of -machine; None where it has only properties."""
    first, _, _ = value.partition(",")
    name = first.removeprefix("type=")
    return None if "=" in name else name


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Options with their values, one dash each; a word that follows an option and has no dash is its value."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("-"):
            continue
        option = word[1:] if word.startswith("--") else word
        if option not in _ALONE and position < len(words) and not words[position].startswith("-"):
            yield option, words[position]
            position += 1
        else:
            yield option, None


def _switches(pairs: list[tuple[str, str | None]]) -> Iterator[str]:
    for option, value in pairs:
        for part in (value or "").split(",") if option in ("-machine", "-M") else ():
            if _SWITCH.fullmatch(part) and not part.startswith(_NOT_CARRIED):
                yield part


def _cpu(model: str | None, pairs: list[tuple[str, str | None]]) -> str | None:
    """The model as QEMU itself named it (a versioned one, where the option had an alias), with the option's flags."""
    option = next((value for option, value in reversed(pairs) if option == "-cpu" and value), None)
    flags = option.partition(",")[1:] if option else ("", "")
    cpu = f"{model or _model(option or '')}{''.join(flags)}"
    return cpu if _CPU.fullmatch(cpu) else None


def _model(cpu: str) -> str:
    return cpu.partition(",")[0]


def _features(cpu: str) -> tuple[str, dict[str, str]]:
    """The model, and what was said about it, without what only looks. As QEMU reads it: a + counts more than a word
    without a sign, a - more than both, whatever comes first."""
    said: dict[str, str] = {}
    for part in sorted(cpu.split(",")[1:], key=lambda part: "+-".find(part[:1])):  # -1: no sign
        name, _, value = part.lstrip("+-").partition("=")
        name = name.replace("_", "-")
        value = {"+": "on", "-": "off"}.get(part[:1], value or "on")
        said[_FEATURE_ALIASES.get(name, name)] = _SWITCHED.get(value, value)
    return _model(cpu), {name: value for name, value in said.items() if name not in _ONLY_LOOK}


def _accelerator(options: Sequence[str], pairs: list[tuple[str, str | None]]) -> str | None:
    if not options:
        return None
    if has(options, "-enable-kvm"):
        return "kvm"
    found = "tcg"  # QEMU's own default
    for option, value in pairs:
        parts = (value or "").split(",")
        if option == "-accel":
            found = parts[0].removeprefix("accel=")
        elif option in ("-machine", "-M"):
            found = next((part[6:] for part in parts if part.startswith("accel=")), found)
    # "kvm:tcg" is a list of what to try.
    return found if found in ACCELERATORS else None


def _disagreement(option: str, his: str, its: str) -> UsageError:
    return UsageError(f"the snapshot was made with {option} {its}, not {option} {his}: its state fits no other")
