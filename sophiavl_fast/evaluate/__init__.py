"""Accuracy on held-out data, and single questions."""
