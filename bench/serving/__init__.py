"""Serving many adapters, beside PEFT and transformers: `make bench-serve`."""
