"""Benchmarks: lorasmith beside its peers, as whole programs, in the same minutes."""
