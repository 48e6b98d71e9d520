"""A trained model back from disk, and what it says."""
