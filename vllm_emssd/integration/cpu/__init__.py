"""What CPUs need."""
