"""fedkd: sites with different, already trained models learn from one another's logits on a public proxy set."""

from importlib.metadata import PackageNotFoundError, version

from fedkd.notebook import compare, load_model, open_run, run

__all__ = ["compare", "load_model", "open_run", "run"]

try:
    __version__ = version("fedkd")
except PackageNotFoundError:  # run from an unpacked Flower bundle, where nothing is installed
    __version__ = "0+bundle"
