"""Tools that tests of every kind use."""
