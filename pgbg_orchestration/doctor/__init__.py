"""What ``pgbg doctor`` looks at."""
