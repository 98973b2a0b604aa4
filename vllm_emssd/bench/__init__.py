"""Measures methods of speculative decoding side by side."""
