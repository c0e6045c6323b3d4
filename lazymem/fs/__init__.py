"""The FUSE end: bytes in, bytes out, errno only in `operations`."""
