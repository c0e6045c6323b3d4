"""Wire protocol, sans-IO: frames to bytes and back; no sockets, no clocks. Shared by the mount and the server."""
