"""What tests use: fault points, and the pytest plugin that we ship."""
