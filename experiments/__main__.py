"""`python -m experiments` is `fedkd`."""

from experiments.cli import main

main()
