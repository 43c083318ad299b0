"""Bring your own, a page each. Run them in a clone with `PYTHONPATH=experiments/examples`, or copy one."""
