"""Checkpoints on disk: saved, proven, kept, found, moved."""
