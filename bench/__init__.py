"""The benchmark: lazymem beside other ways to resume a guest, over the same links, in the same run."""
