"""Benchmarks: lorasmith beside PEFT with transformers' Trainer, as whole programs, in the same minutes."""
