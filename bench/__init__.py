"""Measurements: each module prints a table and, with `--json PATH`, writes the figures with hardware and command."""
