"""One adapter of each layout and each released format version, and what an edit with it looks like."""
