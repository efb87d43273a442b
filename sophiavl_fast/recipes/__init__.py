"""One readable loop a file, top to bottom like the paper."""
