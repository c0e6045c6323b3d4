"""A hand-over's figures, for people."""

from __future__ import annotations

from typing import Any

from lazymem.pages import PAGE_SIZE


def as_text(report: dict[str, Any]) -> str:
    """One fact a line. What a figure is not known of is left out."""
    # Each daemon counts from its own start.
    since = ", since the mount's daemon was started anew" if report.get("mount_restarts") else ""
    rows = [
        ("guest stood", _milliseconds(report.get("downtime_seconds"))),
        ("all of it there after", _seconds(report.get("total_seconds"))),
        ("RAM", _mib(report.get("ram_bytes"))),
        ("came ahead of it", _warmed(report)),
        ("device state", _mib(report.get("state_bytes"))),
        (f"pages over the wire{since}", _mib(report.get("wire_received_bytes"))),
        (f"faults{since}", _faults(report)),
    ]
    known = [(name, value) for name, value in rows if value]
    width = max((len(name) for name, _ in known), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in known)


def _warmed(report: dict[str, Any]) -> str:
    if not report.get("warmed_bytes"):
        return ""
    if report.get("mount_restarts"):  # the next daemon knows nothing of candidates
        return _mib(report["warmed_bytes"])
    used, refused = report.get("candidates_used") or 0, report.get("candidates_refused") or 0
    used_mib, refused_mib = _mib(used * PAGE_SIZE), _mib(refused * PAGE_SIZE)
    return f"{_mib(report['warmed_bytes'])}: {used_mib} of RAM were right, {refused_mib} had changed since"


def _faults(report: dict[str, Any]) -> str:
    count = report.get("demand_faults")
    if not isinstance(count, int):
        return ""
    middle, high = report.get("wait_p50_seconds"), report.get("wait_p99_seconds")
    waited = f", waited p50 {_milliseconds(middle)}, p99 {_milliseconds(high)}" if middle and high else ""
    return f"{count}{waited}"


def _milliseconds(value: object) -> str:
    return f"{value * 1000:.1f} ms" if isinstance(value, int | float) else ""


def _seconds(value: object) -> str:
    return f"{value:.2f} s" if isinstance(value, int | float) else ""


def _mib(value: object) -> str:
    return f"{value / (1 << 20):.1f} MiB" if isinstance(value, int) else ""
