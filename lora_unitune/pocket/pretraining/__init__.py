"""Training of pocket from scratch; not needed at run time."""
