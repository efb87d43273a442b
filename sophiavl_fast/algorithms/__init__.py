"""Scores -> advantages and loss terms: pure functions, no I/O, no distributed calls."""
