"""A run killed on purpose, and held against one that was not."""
