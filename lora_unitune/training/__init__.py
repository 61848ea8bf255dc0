"""Training: photo and base -> adapter."""
