"""Evaluation of checkpoints outside of the run."""
