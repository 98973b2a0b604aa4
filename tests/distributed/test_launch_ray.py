"""scripts/launch_ray.py stops all it started, and nothing else."""
