"""Measuring methods side by side, and predicting them: traces, prices, a simulator."""
