"""Steady load for an hour or so: what the processes that wait for jobs hold, and what the server holds for them."""
