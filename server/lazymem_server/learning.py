"""`--learn`: the working set of a snapshot that has none, taken from the first client that sends one, for all others.

Whoever may connect may send one, and so decide in which order later clients fetch pages ahead of their guests; never
what is in the pages, which are verified. What is taken is bounded, bound to the snapshot, in its RAM, and taken once.

Kept in a folder of its own, since snapshots are read-only: a file for each identity. An unhashed snapshot's identity
ends with the server, so what was learned of it stays in memory. See record 0007.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from types import TracebackType

from lazymem.errors import SnapshotError, UsageError
from lazymem.snapshot import workingset
from lazymem.snapshot.reader import SnapshotReader
from lazymem.snapshot.wholefile import write_whole
from lazymem.wire.messages import Error, ErrorCode, FileStored, StoreFile
from lazymem_server.privileges import Account, make_folder

log = logging.getLogger("lazymem.server")


class Learning:
    """What was learned, by identity. Any thread may call any method."""

    def __init__(self, folder: Path, maybe_account: Account | None = None) -> None:
        """`maybe_account`: whom we shall become; a folder that is made here is his.

        Raises:
            UsageError: `folder` is none, and none can be made.
        """
        try:
            make_folder(folder, maybe_account)
            self._descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"--learn {folder}: {error.strerror}") from error
        self._folder = folder
        self._place = Path(f"/proc/self/fd/{self._descriptor}")  # who we become may not pass the folders above it
        self._lock = threading.Lock()
        self._learned: dict[bytes, bytes] = {}

    def check_place(self, maybe_account: Account | None) -> None:
        """Whether who we have become can write there.

        Raises:
            UsageError: he cannot, and is who was asked for.
        """
        if os.access(self._place, os.W_OK | os.X_OK):
            return
        who = maybe_account.name if maybe_account is not None else "this user"
        problem = f"--learn {self._folder}: {who} cannot write there"
        if maybe_account is not None and maybe_account.asked:
            raise UsageError(f"{problem}: make it his")
        log.warning("%s: what is learned is not kept; make it his, or name another with --user", problem)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Learning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def learned(self, reader: SnapshotReader) -> bytes:
        """The working set's bytes, empty when there is none yet. A file that is of no use is as good as none."""
        with self._lock:
            found = self._learned.get(reader.identity)
            if found is None:
                found = self._learned[reader.identity] = self._load(reader) if reader.hashed else b""
            return found

    def wants(self, reader: SnapshotReader) -> bool:
        return not reader.working_set.size_bytes and not self.learned(reader)

    def keep(self, reader: SnapshotReader, data: bytes) -> bool:
        """Keep `data` if nobody was first.

        Raises:
            SnapshotError: it is no working set of this snapshot.
        """
        found = workingset.decode(data, reader.identity, reader.total_pages)
        with self._lock:
            if self._learned.get(reader.identity):
                return False
            self._learned[reader.identity] = data
        log.info("learned the working set of %s: %d pages in %d runs", reader.folder.name, found.pages, len(found.runs))
        if reader.hashed:
            try:
                write_whole(self._path(reader), data)
            except OSError as error:
                log.warning("what was learned is not kept beyond this server's end: %s", error.strerror)
        return True

    def _path(self, reader: SnapshotReader) -> Path:
        return self._place / f"{reader.identity.hex()}.{workingset.WORKING_SET_NAME}"

    def _load(self, reader: SnapshotReader) -> bytes:
        path = self._path(reader)
        try:
            with path.open("rb") as file:
                data = file.read(workingset.MAX_BYTES + 1)
            workingset.decode(data, reader.identity, reader.total_pages)
        except FileNotFoundError:
            return b""
        except (OSError, SnapshotError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            log.warning("%s is not used, and learned anew: %s", self._folder / path.name, what)
            return b""
        return data


class Upload:
    """One client's file on its way here. At most 1 MiB, in pieces that follow each other."""

    def __init__(self, learning: Learning, reader: SnapshotReader) -> None:
        self._learning = learning
        self._reader = reader
        self._data = bytearray()
        self._total = 0

    def take(self, piece: StoreFile) -> FileStored | Error:
        """The answer to a piece that the protocol allows."""
        if not piece.offset:
            self._data.clear()
            self._total = piece.total_bytes
        if piece.offset != len(self._data) or piece.total_bytes != self._total:
            self._data.clear()
            return Error(piece.id, ErrorCode.BAD_REQUEST, "a piece that does not follow the one before")
        self._data += piece.data
        if len(self._data) < self._total:
            return FileStored(piece.id)
        data = bytes(self._data)
        self._data.clear()
        try:
            kept = self._learning.keep(self._reader, data)
        except SnapshotError as error:
            return Error(piece.id, ErrorCode.BAD_REQUEST, str(error))
        if not kept:
            return Error(piece.id, ErrorCode.NOT_WANTED, "another client's working set came first")
        return FileStored(piece.id)
