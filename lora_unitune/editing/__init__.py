"""The edit: base, adapter and words -> images."""
