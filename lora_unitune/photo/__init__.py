"""Reading and resizing of photos; independent of any model."""
