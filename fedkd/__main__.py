"""The command `fedkd`, also as `python -m fedkd`.

The command line lies outside of this package, in the folder of the Flower app: beside it in a clone, inside it in an
installed wheel, where a generic name like `experiments` must be nobody else's trouble. Only this process puts that
folder first on its path; what a notebook calls (`fedkd/notebook.py`) puts it last.
"""

import importlib
import sys

from fedkd.source import app_folder


def main() -> None:
    """Run the command line."""
    folder = str(app_folder())
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)  # ahead of any other package called `experiments`
    importlib.import_module("experiments.cli").main()


if __name__ == "__main__":
    main()
