"""vLLM's V2 model runner, with unpadded drafting."""
