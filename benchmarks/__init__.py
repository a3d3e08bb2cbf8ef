"""Benchmarks: every operator against the materializing reference and the peers, in one run."""
