"""The published snapshots, by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

from lazymem.errors import UsageError
from lazymem.snapshot.reader import SnapshotReader, open_snapshot
from lazymem.wire.rules import name_problem


class Published(Protocol):
    """What a client may choose from."""

    def find(self, name: str) -> tuple[str, SnapshotReader] | None:
        """The snapshot called `name`, with its name; the empty name means the only one. None if there is no such."""
        ...

    def refusal(self, name: str) -> str:
        """Why `find` found none, for the client."""
        ...


class Catalog:
    """Open snapshots. Closes them at the end of its `with` block."""

    def __init__(self, specs: Iterable[str | Path], parents: Sequence[Path] = ()) -> None:
        """Open each of `specs`: a folder, published by its base name, or ``NAME=FOLDER``. A delta's parent is
        looked for among `parents`, then beside it.

        Raises:
            UsageError: a name occurs twice or cannot be one, or there is no snapshot at all.
            SnapshotError: a folder is not a snapshot. Nothing stays open.
        """
        self._readers: dict[str, SnapshotReader] = {}
        with ExitStack() as files:
            for spec in specs:
                name, folder = parse_spec(spec)
                if name in self._readers:
                    raise UsageError(f"two snapshots are called {name!r}: give one another name with NAME={folder}")
                self._readers[name] = files.enter_context(open_snapshot(folder, parents))
            if not self._readers:
                raise UsageError("there is no snapshot to serve")
            self._files = files.pop_all()

    def find(self, name: str) -> tuple[str, SnapshotReader] | None:
        """As `Published`."""
        if not name and len(self._readers) == 1:
            return next(iter(self._readers.items()))
        reader = self._readers.get(name)
        return None if reader is None else (name, reader)

    def refusal(self, name: str) -> str:
        """As `Published`."""
        return f"there is no snapshot {name!r} here" if name else "several snapshots here: name one"

    def __getitem__(self, name: str) -> SnapshotReader:
        return self._readers[name]

    def __iter__(self) -> Iterator[tuple[str, SnapshotReader]]:
        return iter(self._readers.items())

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse_spec(spec: str | Path) -> tuple[str, Path]:
    """``NAME=FOLDER`` or ``FOLDER`` as name and folder. A folder that exists under the whole text wins.

    Raises:
        UsageError: the name cannot be one.
    """
    text = str(spec)
    name, equals, rest = text.partition("=")
    if equals and "/" not in name and rest and not os.path.exists(text):
        folder = Path(rest)
    else:
        folder = Path(text)
        name = folder.name or folder.resolve().name
        if name in (".", "..", ""):
            name = folder.resolve().name
    wrong = name_problem(name)
    if wrong is not None or not name:
        raise UsageError(f"cannot publish {text!r}: {wrong or 'it has no name; use NAME=FOLDER'}")
    return name, folder
