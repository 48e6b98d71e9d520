"""Kills a run on purpose, and compares it with an uninterrupted one."""
