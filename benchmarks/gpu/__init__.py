"""Benchmarks of the kernels on a GPU: the bandwidth table, tile sizes, and what they are measured with."""
