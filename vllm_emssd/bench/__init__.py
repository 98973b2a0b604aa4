"""Measuring: speculative methods side by side on one workload, and their figures."""
