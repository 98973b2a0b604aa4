"""Everything that touches vLLM: the only package that imports it."""
