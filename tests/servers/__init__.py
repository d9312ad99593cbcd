"""The servers that the suite runs on: the real one, and the embedded one with its extension or stand-ins."""
