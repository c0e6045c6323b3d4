"""A snapshot on disk: manifest, digest tree, reader and writer."""
