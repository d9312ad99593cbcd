"""The way of one job, from its launch to its outcome."""
