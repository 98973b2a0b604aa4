"""Predicts speeds from a recorded trace and a cost table."""
