"""The fit: photo and base -> adapter."""
