"""Comparisons and searches: many trials through one `flwr run`."""
