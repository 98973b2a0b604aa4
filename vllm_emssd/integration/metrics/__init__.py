"""Where counters are shown."""
