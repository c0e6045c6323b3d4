"""lazymem: resume a virtual machine here while its memory is still there."""

__version__ = "0.1.0"
