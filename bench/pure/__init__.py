"""What is pure, by pytest-benchmark: `make bench-pure` measures and compares with the baseline."""
