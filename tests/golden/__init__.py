"""One adapter of each layout and each released format version, and an edit with each."""
