"""Benchmarks and their guards: `pytest benchmarks/`, the long list with `-m full`, results with `--save-results`."""
