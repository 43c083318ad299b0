"""Everything that drives runs and measures them: the command line, comparisons, benchmarks."""
