"""Benchmarks. Each prints a table for people and writes one JSON line per setting; results are committed."""
