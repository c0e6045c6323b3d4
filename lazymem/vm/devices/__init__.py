"""The chips of the small PC, one a file; a device sees offsets only."""
