"""Data: sources, partitions over peers, and the public proxy set."""
