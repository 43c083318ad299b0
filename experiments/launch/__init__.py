"""Start Flower, submit a run, follow its log, and take everything down again."""
