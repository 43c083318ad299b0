"""The studies behind `docs/results.md`: their data, their models, their recipes."""
