"""Measurements: `python -m bench --help`. Each prints a table, and writes JSON to the path that `--json` names."""
