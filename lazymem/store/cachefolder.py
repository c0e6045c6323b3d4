"""The cache of one snapshot on disk: ``<cache>/<identity>/`` with its pages, page map and digests. Blocking.

Shared by all mounts of that snapshot at a time, and deletable at any time. A folder appears by one rename, whole, so
two mounts that make it at once end up in the same one. A folder that is not right in every point is renamed away (by
one of them at a time) and made again; its bytes are never believed, and are verified again in any case (`pristine`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
from pathlib import Path

from msgspec import Struct

from lazymem.errors import StoreError
from lazymem.store import folders
from lazymem.store.digestfile import DigestFile
from lazymem.store.mendable import is_short
from lazymem.store.origin import RamOrigin
from lazymem.store.pagefile import PageFile
from lazymem.store.pagemap import PageMap

FORMAT = "lazymem-cache"
VERSION = 1

PAGES_NAME = "pages"
MAP_NAME = "map"
DIGESTS_NAME = "digests"
META_NAME = "meta.json"

_DRAFT_PREFIX = ".new-cache-"
_DRAFT = re.compile(re.escape(_DRAFT_PREFIX) + "[0-9a-f]{16}")
_NAMES = (PAGES_NAME, MAP_NAME, DIGESTS_NAME, META_NAME)

_ATTEMPTS = 8
"""Others may make or replace the folder between our look and our step, each time once at most; more is a fight."""

log = logging.getLogger(__name__)


class CacheFolder(Struct, frozen=True):
    """An open cache."""

    path: Path
    pages: PageFile
    held: PageMap
    digests: DigestFile

    def close(self) -> None:
        self.pages.close()
        self.held.close()
        self.digests.close()


def open_cache(cache: Path, origin: RamOrigin) -> CacheFolder:
    """Open, or make, the snapshot's folder below `cache` (made if missing).

    Raises:
        StoreError: the disk refused.
    """
    folders.ensure_folder(cache)
    path = cache / origin.identity.hex()
    for _ in range(_ATTEMPTS):
        if not os.path.lexists(path):
            _create_unless_another_did(cache, path, origin)
        try:
            return _open(path, origin)
        except StoreError as error:
            if is_short(error):
                raise  # nothing is wrong with the folder, and another one would not do either
        maybe_opened = _maybe_opened_or_set_aside(cache, path, origin)
        if maybe_opened is not None:
            return maybe_opened
    raise StoreError(f"the cache {path} does not become usable: remove it")


def _meta(origin: RamOrigin) -> dict[str, object]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "identity": origin.identity.hex(),
        "size_bytes": origin.size_bytes,
        "root": origin.root.hex() if origin.root else None,
    }


def _create_unless_another_did(cache: Path, path: Path, origin: RamOrigin) -> None:
    """A filling process that is not needed after all is killed, perhaps in the midst of this: its draft has to go."""
    with folders.locked(cache) as is_locked:
        if os.path.lexists(path):
            return
        if is_locked:  # so nobody is at any of them
            for draft in _drafts(cache):
                if not folders.why_not_ours(draft) and _only_ours_in(draft):
                    folders.remove_folder(draft)
        _create(cache, path, origin)


def _drafts(cache: Path) -> list[Path]:
    """Of killed ones. Empty if the disk does not say: whoever comes next looks again."""
    try:
        return [cache / name for name in os.listdir(cache) if _DRAFT.fullmatch(name)]
    except OSError:
        return []


def _only_ours_in(draft: Path) -> bool:
    """Whoever names a folder of his as the cache keeps what he has in it, whatever that is called."""
    try:
        return all(name in _NAMES or name.startswith(f".{META_NAME}.") for name in os.listdir(draft))
    except OSError:  # the disk does not say
        return False


def _create(cache: Path, path: Path, origin: RamOrigin) -> None:
    """Make the folder under another name, then rename it; whoever comes second finds the first one's."""
    draft = cache / f"{_DRAFT_PREFIX}{secrets.token_hex(8)}"
    try:
        folders.make_folder(draft)
        folders.create_file(draft / PAGES_NAME, origin.size_bytes)
        folders.create_file(draft / MAP_NAME, origin.pages)
        folders.create_file(draft / DIGESTS_NAME, origin.shape.file_bytes)
        # After a crash of the host it may be empty, and the folder is then made again: no mount waits for that.
        folders.write_record(draft / META_NAME, _meta(origin), durable=False)
        os.rename(draft, path)
    except OSError as error:
        folders.remove_folder(draft)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise StoreError(f"cannot make the cache {path}: {error.strerror}") from error


def _open(path: Path, origin: RamOrigin) -> CacheFolder:
    reason = folders.why_not_ours(path)
    if reason:
        raise StoreError(reason)
    try:
        record = folders.read_record(path / META_NAME)
    except OSError as error:
        raise StoreError(f"cannot read {path / META_NAME}: {error.strerror}") from error
    if record != _meta(origin):
        raise StoreError("it is of another format, version, or size")
    with contextlib.ExitStack() as opened:
        pages = PageFile(folders.open_file(path / PAGES_NAME, origin.size_bytes), str(path / PAGES_NAME))
        opened.callback(pages.close)
        held = PageMap(folders.open_file(path / MAP_NAME, origin.pages), origin.pages)
        opened.callback(held.close)
        digests = DigestFile(folders.open_file(path / DIGESTS_NAME, origin.shape.file_bytes), origin.shape)
        opened.pop_all()
    return CacheFolder(path, pages, held, digests)


def _maybe_opened_or_set_aside(cache: Path, path: Path, origin: RamOrigin) -> CacheFolder | None:
    """Judge the folder once more while nobody moves it: a mount and its filling process come to it at once, and what
    one of them made anew was moved away by the other, which had found the one before; then each had a cache of its own.
    None: there is none now."""
    with folders.locked(cache):
        try:
            return _open(path, origin)
        except StoreError as error:
            if is_short(error):
                raise
            _set_aside(path, error)
            return None


def _set_aside(path: Path, reason: StoreError) -> None:
    if not os.path.lexists(path):
        return
    aside = path.with_name(f"{path.name}.set-aside-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"the cache {path} is not usable ({reason}) and cannot be moved: {error.strerror}") from error
    log.warning("the cache %s is not usable (%s); moved to %s and begun again", path, reason, aside.name)
