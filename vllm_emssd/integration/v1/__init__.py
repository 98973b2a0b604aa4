"""vLLM's V1 model runner, with unpadded drafting."""
