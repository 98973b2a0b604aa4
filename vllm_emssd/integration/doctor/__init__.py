"""What `vllm-emssd doctor` looks at."""
