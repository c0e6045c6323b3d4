"""The JSON at the end of a stream: what its sections contain, for QEMU's analyser, and a digest of each section. Pure.

QEMU's description is for analysis only. Ours has one more key, "lazymem", with a digest of every section, so that an
altered byte inside a field is found in a lone stream too, and by the section's name. The text is canonical: the loader
builds it anew from what it read and compares bytes. A change to it therefore takes a new machine type.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from blake3 import blake3

from lazymem.pages import PAGE_SIZE
from lazymem.vm.devicestate import Field, Layout
from lazymem.vm.savestream.format import CAPABILITIES_NAME, CONFIGURATION_NAME, IGNORE_SHARED, StreamShape

MAX_DESCRIPTION_BYTES = 1 << 20
"""A machine of ours needs under 16 KiB, and a MiB of ram sections' digests is a guest with TiB of ordinary memory."""

_DIGEST_BYTES = 16


def section_digest(data: bytes | memoryview) -> str:
    """Digest (hex) of a section from its mark to its footer."""
    return blake3(data).hexdigest(_DIGEST_BYTES)


def description(shape: StreamShape, digests: Sequence[tuple[str, str]]) -> bytes:
    """The text. `digests`: (section name, hex) for each section in stream order."""
    document = {
        "configuration": _configuration(shape),
        "page_size": PAGE_SIZE,
        "devices": [_device(layout) for layout in shape.layouts],
        "lazymem": {"sections": [[name, digest] for name, digest in digests]},
    }
    return json.dumps(document, separators=(",", ":")).encode()


def told_digests(text: bytes) -> list[tuple[str, str]]:
    """(section name, hex) as a description tells them.

    Raises:
        ValueError: it is not such a description.
    """
    document = json.loads(text)
    try:
        return [(str(name), str(digest)) for name, digest in document["lazymem"]["sections"]]
    except (KeyError, TypeError) as error:
        raise ValueError("it has no section digests") from error


def _configuration(shape: StreamShape) -> dict[str, Any]:
    found: dict[str, Any] = {
        "vmsd_name": CONFIGURATION_NAME,
        "version": 1,
        "fields": [_entry("len", "uint32", 4), _entry("name", "buffer", len(shape.machine.encode()))],
    }
    if shape.ignore_shared:
        fields = [_entry("caps_count", "uint32", 4), _entry("capabilities", "capability", len(IGNORE_SHARED))]
        found["subsections"] = [{"vmsd_name": CAPABILITIES_NAME, "version": 1, "fields": fields}]
    return found


def _device(layout: Layout) -> dict[str, Any]:
    return {
        "name": layout.name,
        "instance_id": layout.instance,
        "vmsd_name": layout.name,
        "version": layout.version,
        "fields": [_field(field) for field in layout.fields],
    }


def _field(field: Field) -> dict[str, Any]:
    return _entry(field.name, "buffer" if field.buffer else f"uint{8 * field.size_bytes}", field.size_bytes)


def _entry(name: str, kind: str, size: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "size": size}
