"""Training on one device: loops, the objective on the proxy set, and what makes them fast."""
