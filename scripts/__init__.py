"""What `make` and CI run."""
