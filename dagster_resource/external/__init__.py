"""Jobs that no step waits for: submitted, launched by somebody else, or left behind."""
