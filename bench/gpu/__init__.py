"""Benchmarks of the pool on a GPU, in plain torch: they need no engine."""
