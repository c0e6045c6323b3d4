"""What a mount's next daemon must know and can read nowhere else, in memory that outlives this one (memfd_create(2)).

A change writes the whole record beside the present one, and then where it is, in one small write at the start: so
whenever a daemon is killed its successor finds the last whole one.
"""

from __future__ import annotations

import os
import struct

import msgspec
from msgspec import Struct, structs

from lazymem.errors import EnvironmentRefusedError
from lazymem.fs.mountinfo import Mount

VERSION = 1
"""Raised when a successor could not make sense of an older one's record. A field that is added has a default."""

_HEAD = struct.Struct("=8sIIQQ")
"""Magic, version, padding; where the record is and how long, in bytes."""

_MAGIC = b"lazymem\0"

MAX_BYTES = 64 << 20
"""The notes are a server's welcome with its manifest, and a working set of a MiB."""


class Contents(Struct, frozen=True):
    """`mounted_ns`: the files' times (Unix, nanoseconds), which must not move (rule 11). `restarts`: daemons before
    this one. `wish_to_end`: somebody asked for an unmount. `state_path`: the folder of written pages; a private one
    goes with the mount. `notes` belong to whoever puts them: a server's welcome, say, of which this room knows
    nothing."""

    maybe_mounted: Mount | None = None
    mounted_ns: int = 0
    restarts: int = 0
    wish_to_end: bool = False
    init: bytes = b""
    init_answer: bytes = b""
    state_path: str = ""
    state_is_private: bool = False
    notes: dict[str, bytes] = {}


class SessionRecord:
    """The record in the open file `descriptor`, taken over; fits `agreement.InitRecord`."""

    def __init__(self, descriptor: int, contents: Contents, offset: int = _HEAD.size, length: int = 0) -> None:
        self.descriptor = descriptor
        self._contents = contents
        self._offset, self._end = offset, offset + length

    @classmethod
    def create(cls) -> SessionRecord:
        """An empty one."""
        made = cls(os.memfd_create("lazymem-session", os.MFD_CLOEXEC), Contents())
        made._store()
        return made

    @classmethod
    def read(cls, descriptor: int) -> SessionRecord:
        """An earlier daemon's.

        Raises:
            EnvironmentRefusedError: it is none, or of another version of lazymem that we do not understand.
        """
        head = os.pread(descriptor, _HEAD.size, 0)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise EnvironmentRefusedError("what an earlier daemon left behind is no session's record")
        _, version, _, offset, length = _HEAD.unpack(head)
        if version != VERSION or length > MAX_BYTES:
            raise EnvironmentRefusedError(
                f"the running daemon's record has version {version}, and this lazymem knows {VERSION}: "
                "it cannot go on with the mount"
            )
        try:
            contents = msgspec.msgpack.decode(os.pread(descriptor, length, offset), type=Contents)
        except msgspec.MsgspecError as error:
            raise EnvironmentRefusedError(f"an earlier daemon's record makes no sense: {error}") from error
        return cls(descriptor, contents, offset, length)

    @property
    def contents(self) -> Contents:
        return self._contents

    @property
    def init(self) -> bytes:
        return self._contents.init

    @property
    def init_answer(self) -> bytes:
        return self._contents.init_answer

    def note_init(self, request: bytes) -> None:
        self.change(init=request)

    def note_init_answer(self, answer: bytes) -> None:
        self.change(init_answer=answer)

    def note(self, name: str, data: bytes) -> None:
        self.change(notes={**self._contents.notes, name: data})

    def change(self, **fields: object) -> None:
        """Fields of `Contents`. It outlives this process when this returns."""
        self._contents = structs.replace(self._contents, **fields)
        self._store()

    def _store(self) -> None:
        data = msgspec.msgpack.encode(self._contents)
        before = _HEAD.size + len(data) <= self._offset
        offset = _HEAD.size if before else self._end
        os.pwrite(self.descriptor, data, offset)
        os.pwrite(self.descriptor, _HEAD.pack(_MAGIC, VERSION, 0, offset, len(data)), 0)
        self._offset, self._end = offset, offset + len(data)
