"""Cost of fits and edits: seconds, memory, bytes, and utilization of the device."""
