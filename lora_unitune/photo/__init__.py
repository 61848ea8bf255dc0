"""A photo's pixels; no model."""
