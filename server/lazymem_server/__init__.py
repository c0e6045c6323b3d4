"""lazymem-serve: publishes the RAM of snapshots, read-only."""
