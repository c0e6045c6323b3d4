"""Which pages are held, which the guest wrote, and the sparse files that hold them."""
