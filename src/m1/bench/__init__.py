"""Benchmarks: the kernels and the engine against each other, against peers, and against the machine's limits."""
