"""The FUSE operations that pyfuse3 serves: all but READ and WRITE of the RAM, which `channel` answers.

Every handler is guarded: what escapes from one ends pyfuse3's main loop, and with it every guest on the mount. A
failed page is EIO to its reader, which a guest that maps the file sees as SIGBUS; the log says why.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import pyfuse3

from lazymem.errors import LazymemError
from lazymem.fs.failures import told_errno
from lazymem.fs.tree import FOREVER_SECONDS, RAM_INODE, ROOT_INODE, Node, Tree
from lazymem.pages import PAGE_SIZE

STATUS_XATTR = b"user.lazymem.status"
RUN_XATTR = b"user.lazymem.run"
UPGRADE_XATTR = b"user.lazymem.upgrade"
"""To set it is to have another daemon go on. The kernel lets only the mount's owner do that."""

PRIVATE_XATTR = b"user.lazymem.private"
"""Set by a process on a template's RAM: its next open for writing is for a private map (see `Operations.open`)."""

MAX_PROMISES = 1024
"""Processes that said so and have not opened it yet; of more, the oldest are forgotten, which costs only time."""

P = ParamSpec("P")
R = TypeVar("R")


class RamFile(Protocol):
    """What the operations need of the store's guest RAM."""

    async def sync(self) -> None: ...


SmallFile = Callable[[int], Awaitable[bytes]]
"""Whole content of the manifest or the vmstate, by inode number."""

Part = Callable[[int, int], Awaitable[bytes]]
"""So many bytes from an offset on, which lie inside the file."""


def _guarded(handler: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Turn our errors into an errno, and a bug into EIO for one request instead of the end of the mount."""

    @functools.wraps(handler)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except LazymemError as error:
            raise pyfuse3.FUSEError(told_errno(handler.__name__, error)) from error
        except pyfuse3.FUSEError:
            raise
        except Exception as error:  # the guest of another page must outlive a bug in this one's handler
            raise pyfuse3.FUSEError(told_errno(handler.__name__, error)) from error

    return guarded


class Operations(pyfuse3.Operations):
    """One snapshot's tree. `on_open` is called with the thread that opens the RAM file for writing (who only reads it
    is the channel's), `on_release` when a descriptor of the RAM file has gone, `on_upgrade` when somebody wants another
    daemon to go on; False: there is nobody to start one.

    `parts`: by inode number, files that are read in parts and not whole. `template`: the RAM is for private maps only,
    so what opens it for writing gets direct I/O: then the kernel refuses a shared map, whose writes others would see.
    It drops its cache of the file, too, at each private one; so who promises that his will be private
    (`PRIVATE_XATTR`) is believed.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self,
        tree: Tree,
        ram: RamFile,
        small_file: SmallFile,
        xattrs: dict[bytes, Callable[[], bytes]],
        *,
        mounted_ns: int,
        on_open: Callable[[int], None] = lambda thread: None,
        on_release: Callable[[], None] = lambda: None,
        on_upgrade: Callable[[bytes], bool] = lambda value: False,
        parts: Mapping[int, Part] | None = None,
        template: bool = False,
    ) -> None:
        super().__init__()
        self._tree = tree
        self._ram = ram
        self._small_file = small_file
        self._xattrs = xattrs
        self._mounted_ns = mounted_ns
        self._on_open = on_open
        self._on_release = on_release
        self._on_upgrade = on_upgrade
        self._parts = parts or {}
        self._template = template
        self._promised: dict[int, None] = {}
        self._uid, self._gid = os.getuid(), os.getgid()

    # -- names and attributes

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(node.inode)
        entry.st_mode = pyfuse3.ModeT(node.mode)
        entry.st_nlink = 2 if stat.S_ISDIR(node.mode) else 1
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_size = node.size
        entry.st_blksize = PAGE_SIZE
        entry.st_blocks = -(-node.size // 512)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._mounted_ns
        entry.entry_timeout = node.name_seconds
        entry.attr_timeout = FOREVER_SECONDS
        return entry

    def _node(self, inode: int) -> Node:
        node = self._tree.maybe_node(inode)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return node

    @_guarded
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name in (b".", b".."):
            return self._attributes(self._tree.root)
        node = self._tree.maybe_child(parent_inode, name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(node)

    @_guarded
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(self._node(inode))

    @_guarded
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        # A truncation would zero a running guest without an error; a changed time would drop its resident pages.
        raise pyfuse3.FUSEError(errno.EPERM)

    @_guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = PAGE_SIZE  # emulators ask for the block size before they map
        data.f_blocks = self._tree.ram.size // PAGE_SIZE
        data.f_bfree = data.f_bavail = 0
        data.f_files = len(self._tree.children()) + 1
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    @_guarded
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        value = self._xattrs.get(name) if inode in (ROOT_INODE, RAM_INODE) else None
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value()

    @_guarded
    async def setxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        if inode == ROOT_INODE and name == UPGRADE_XATTR:
            if not self._on_upgrade(value):
                raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
            return
        if not (self._template and inode == RAM_INODE and name == PRIVATE_XATTR):
            raise pyfuse3.FUSEError(errno.EPERM)
        self._promised[ctx.pid] = None
        if len(self._promised) > MAX_PROMISES:
            del self._promised[next(iter(self._promised))]

    @_guarded
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        # Not listed: a tool that copies attributes along with a file should not copy these.
        return ()

    # -- folders

    @_guarded
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        if inode != ROOT_INODE:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return pyfuse3.FileHandleT(inode)

    @_guarded
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for node in self._tree.children():
            if node.inode <= start_id:
                continue
            name = pyfuse3.FileNameT(node.name)
            if not pyfuse3.readdir_reply(token, name, self._attributes(node), node.inode):
                return

    @_guarded
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        return

    # -- files

    @_guarded
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        node = self._node(inode)
        if flags & os.O_TRUNC:
            raise pyfuse3.FUSEError(errno.EPERM)
        if inode == ROOT_INODE:
            raise pyfuse3.FUSEError(errno.EISDIR)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes and not node.mode & 0o222:
            raise pyfuse3.FUSEError(errno.EROFS)
        # fh is the inode, so that a handle outlives this daemon; keep_cache, or each open would drop resident RAM. What
        # is read in parts is read as it is now, and no more than was asked for: nothing of it is kept, or read ahead.
        direct = inode in self._parts
        if self._template and inode == RAM_INODE and writes:
            direct = ctx.pid not in self._promised
            self._promised.pop(ctx.pid, None)
        if inode == RAM_INODE:
            self._on_open(ctx.pid)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True, direct_io=direct)

    @_guarded
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        assert fh != RAM_INODE, "the channel's"
        if fh in self._parts:
            size = min(size, self._node(fh).size - off)
            return await self._parts[fh](off, size) if size > 0 else b""
        content = await self._small_file(fh)
        return content[off : off + size]

    @_guarded
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        raise pyfuse3.FUSEError(errno.EROFS)

    @_guarded
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        return

    @_guarded
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        if fh == RAM_INODE:
            await self._ram.sync()

    @_guarded
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        if fh == RAM_INODE:
            self._on_release()


def _refuse(name: str) -> Callable[..., Awaitable[Any]]:
    async def refused(self: Operations, *args: object) -> Any:
        raise pyfuse3.FUSEError(errno.EPERM)

    refused.__name__ = name
    return refused


# Whatever would change the tree is EPERM (rule 11), not the library's ENOSYS.
for _name in ("create", "mkdir", "mknod", "rename", "rmdir", "unlink", "link", "symlink", "removexattr"):
    setattr(Operations, _name, _refuse(_name))
