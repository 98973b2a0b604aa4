"""What vLLM's front end learns: the method, its checks, and serving."""
