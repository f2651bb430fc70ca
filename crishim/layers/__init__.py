"""Layers: the store, the unpack worker, overlay mounts."""
