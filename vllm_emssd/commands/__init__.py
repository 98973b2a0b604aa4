"""The commands of `vllm-emssd`: one module each, with `add_arguments` and `run`."""
