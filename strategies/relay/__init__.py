"""The post office: it carries the mail of a run, and writes down what happened. Imports no torch."""
