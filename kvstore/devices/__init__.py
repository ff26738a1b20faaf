"""Copies between an engine's own memory and slots of the host slab: `base` is the face, `cpu` and `cuda` do it."""
