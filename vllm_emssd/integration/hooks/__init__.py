"""What the plugin replaces in vLLM."""
