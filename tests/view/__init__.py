"""The views: the live view in the terminal, the page in a browser, the timeline in a file."""
