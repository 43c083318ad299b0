"""Finished runs read back: what was compared, and what can be said from a few seeds."""
