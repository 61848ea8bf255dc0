"""Adapters: their file format, their layers on a base, and the layouts of other tools."""
