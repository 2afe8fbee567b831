"""Benchmarks of the pure parts, with pytest-benchmark: `make bench-pure` measures and compares with the baseline."""
