"""Ratios against other ways of running the same SQL, measured side by side in one run."""
