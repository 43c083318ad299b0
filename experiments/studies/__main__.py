"""``python -m experiments.studies slices|gather|tables``: from the data to `docs/results.md`."""

import re
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from experiments.outputs import is_csv_with, refuse_foreign_file
from experiments.studies import slices as data
from experiments.studies.gather import gather as read
from experiments.studies.tables import render
from fedkd.errors import SettingError

app = typer.Typer(help=__doc__, no_args_is_help=True)
_BLOCK = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


@app.command()
def slices(
    out: Path,
    fashion_mnist: Annotated[Path | None, typer.Option(help="Folder that holds FashionMNIST/raw, unpacked.")] = None,
    cifar10: Annotated[Path | None, typer.Option(help="An npz with x_train, y_train, x_test, y_test.")] = None,
) -> None:
    """Write the slices that the studies' recipes name."""
    for name in (name for name, source in (("fashion-mnist", fashion_mnist), ("cifar10", cifar10)) if source):
        refuse_foreign_file(out / f"{name}.npz", key="OUT", ours=False)
    out.mkdir(parents=True, exist_ok=True)
    if fashion_mnist:
        np.savez(out / "fashion-mnist.npz", **data.fashion_mnist(fashion_mnist))
    if cifar10:
        np.savez(out / "cifar10.npz", **data.cifar10(cifar10))


@app.command()
def gather(folders: list[Path], out: Annotated[Path, typer.Option(help="Where the CSV files go.")]) -> None:
    """Write one CSV file for each comparison's folder."""
    places = {out / f"{folder.resolve().name}.csv": folder for folder in folders}
    if len(places) < len(folders):
        raise SettingError("FOLDERS", ", ".join(map(str, folders)), "folders of different names: each gives a file")
    for path in places:
        refuse_foreign_file(path, key="--out", ours=is_csv_with(path, ("round", "accuracy", "worst", "spread")))
    out.mkdir(parents=True, exist_ok=True)
    for path, folder in places.items():
        read(folder).to_csv(path, index=False, float_format="%.6g")


@app.command()
def tables(page: Path) -> None:
    """Put the tables, made from the CSV files in the folder of the page's name, between their markers in a page."""
    page.write_text(fill(page.read_text(), page.with_suffix("")))


def fill(text: str, folder: Path) -> str:
    """Return a page with its tables made anew from the CSV files in a folder."""
    return _BLOCK.sub(lambda block: block[1] + "\n" + render(block[2], folder) + "\n" + block[3], text)


if __name__ == "__main__":
    app()
