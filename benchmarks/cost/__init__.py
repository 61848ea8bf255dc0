"""What fits and edits cost: seconds, memory, bytes, and how near they come to what the device can do."""
