"""Benchmarks: `pytest bench --benchmark-only --benchmark-json=FILE`, then `python -m bench.report FILE`."""
