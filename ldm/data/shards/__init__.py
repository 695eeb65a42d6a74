"""Tar shards: packing, indexing, local and remote reading."""
