"""Mutated adapter files, and a harness that opens them."""
