"""Measurements: `python -m bench --help`. Each prints a table and, writes JSON where `--json` says."""
