"""Checkpoints judged from outside of the run."""
