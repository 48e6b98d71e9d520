"""Imports and exports Hugging Face model folders."""
