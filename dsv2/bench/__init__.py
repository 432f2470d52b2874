"""Benchmarks against peers and limits, `python -m dsv2.bench NAME`: ratios within one run on one machine."""
