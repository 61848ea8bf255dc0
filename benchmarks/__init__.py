"""Benchmarks that this project reports; each result is written by a command, with its provenance."""
