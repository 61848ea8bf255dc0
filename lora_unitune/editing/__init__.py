"""Editing: base, adapter and prompt -> images."""
