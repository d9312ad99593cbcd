"""What people look at: the live view in the terminal, the page in the browser, the timeline in a file."""
