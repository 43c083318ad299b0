"""``python -m experiments.studies slices|run|gather|tables|leaderboard|presets``: from data to pages of `docs/`."""

import re
import shlex
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from experiments import slices as data
from experiments.compare.recipe import read
from experiments.compare.running import compare
from experiments.launch.presets import table
from experiments.launch.runner import Federation
from experiments.outputs import is_csv_with, is_json_with, refuse_existing, refuse_foreign_file
from experiments.studies.gather import gather as gathered
from experiments.studies.gather import write
from experiments.studies.leaderboard import TITLE
from experiments.studies.leaderboard import page as leaderboard_page
from experiments.studies.record import contradictions, read_trials
from experiments.studies.tables import render
from fedkd.errors import FedkdError, SettingError
from fedkd.results.folder import git_commit

RECIPES = Path(__file__).parent
PAGE = Path("docs/results.md")
_BLOCK = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_PRESETS = re.compile(r"(<!-- presets -->\n).*?(<!-- /presets -->)", re.DOTALL)
_AsTheyAre = Annotated[
    bool, typer.Option("--as-they-are", help="Take trials of several commits, or of changed files, and record that.")
]

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def slices(
    out: Path,
    fashion_mnist: Annotated[Path | None, typer.Option(help="Folder that holds FashionMNIST/raw, unpacked.")] = None,
    cifar10: Annotated[Path | None, typer.Option(help="An npz with x_train, y_train, x_test, y_test.")] = None,
) -> None:
    """Write the slices that the studies' recipes name."""
    if not fashion_mnist and not cifar10:
        raise SettingError("--fashion-mnist", "", "given, or --cifar10")
    if fashion_mnist and not fashion_mnist.is_dir():
        raise SettingError("--fashion-mnist", str(fashion_mnist), "a folder")
    if cifar10 and not cifar10.is_file():
        raise SettingError("--cifar10", str(cifar10), "a file")
    for name in (name for name, source in (("fashion-mnist", fashion_mnist), ("cifar10", cifar10)) if source):
        refuse_existing(out / f"{name}.npz", key="OUT")
    out.mkdir(parents=True, exist_ok=True)
    if fashion_mnist:
        np.savez(out / "fashion-mnist.npz", **data.fashion_mnist(fashion_mnist))
    if cifar10:
        np.savez(out / "cifar10.npz", **data.cifar10(cifar10))


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Of studies; all if none is given.")] = None,
    *,
    slices: Annotated[Path, typer.Option(help="Folder with the slices.")],
    out: Annotated[Path, typer.Option(help="Folder for the trials; what is finished there is not run again.")],
    page: Annotated[Path, typer.Option(help="Page whose tables and CSV files are made anew.")] = PAGE,
    as_they_are: _AsTheyAre = False,
) -> None:
    """Run studies, write their CSV and JSON files, and put the tables into the page."""
    paths = {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
    if unknown := [name for name in names or () if name not in paths]:
        raise SettingError("NAMES", unknown[0], f"of {', '.join(paths)}")
    _refuse_missing(page, key="--page")  # what takes hours must not fail at its last step
    commit = git_commit(RECIPES)
    if (not commit or commit.endswith("+")) and not as_they_are:
        raise FedkdError(
            f"Expected a clone without changes, but its commit is {commit or 'unknown'}: commit them, or take numbers "
            "that no commit can repeat with --as-they-are."
        )
    chosen = [paths[name] for name in names or paths]
    for path in chosen:
        recipe = read(path, changes={"data-dir": str(slices)})
        words = ["fedkd", "compare", f"experiments/studies/{path.name}", "--out", str(out / path.stem)]
        command = shlex.join([*words, f"data-dir={slices}"])
        print(f"$ {command}", flush=True)
        compared = compare(recipe, Federation(peers=1), out / path.stem, command=command)
        if compared.failed:
            raise FedkdError(f"{len(compared.failed)} trials of {path.stem} failed, the first: {compared.failed[0]}.")
    gather([out / path.stem for path in chosen], out=page.with_suffix(""), as_they_are=as_they_are)
    tables(page)


@app.command()
def gather(
    folders: list[Path],
    *,
    out: Annotated[Path, typer.Option(help="Where the files go.")],
    as_they_are: _AsTheyAre = False,
) -> None:
    """Write a CSV and a JSON file for each comparison's folder, and say which configurations have two numbers."""
    places = {out / f"{folder.resolve().name}.csv": folder for folder in folders}
    if len(places) < len(folders):
        raise SettingError("FOLDERS", ", ".join(map(str, folders)), "folders of different names: each gives a file")
    for path in places:
        beside = path.with_suffix(".json")
        refuse_foreign_file(path, key="--out", ours=is_csv_with(path, ("round", "accuracy", "worst", "spread")))
        refuse_foreign_file(beside, key="--out", ours=is_json_with(beside, ("commits", "settings", "sha256")))
    found = {path: gathered(folder, as_they_are=as_they_are) for path, folder in places.items()}
    out.mkdir(parents=True, exist_ok=True)
    for path, (frame, record) in found.items():
        write(frame, record, path)
    recorded = [path for path in sorted(out.glob("*.csv")) if path.with_suffix(".json").exists()]
    for sentence in contradictions({path.stem: read_trials(path) for path in recorded}):
        print(f"two numbers for {sentence}")


@app.command()
def tables(page: Path) -> None:
    """Put the tables, made from the CSV files in the folder of the page's name, between their markers in a page."""
    _refuse_missing(page, key="PAGE")
    page.write_text(fill(page.read_text(), page.with_suffix("")))


@app.command()
def leaderboard(
    folder: Path,
    page: Annotated[Path, typer.Option(help="The page, which is made anew.")] = Path("docs/leaderboard.md"),
    as_they_are: _AsTheyAre = False,
) -> None:
    """Write the leaderboard's page from the folder of a comparison of presets, as `compare leaderboard` leaves it."""
    refuse_foreign_file(page, key="--page", ours=page.is_file() and page.read_text().startswith(TITLE))
    text = leaderboard_page(folder, as_they_are=as_they_are)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    print(f"written to {page}")


@app.command()
def presets(page: Path) -> None:
    """Put the table of presets, made from their files, between its markers in a page."""
    _refuse_missing(page, key="PAGE")
    page.write_text(with_presets(page.read_text()))


def with_presets(text: str) -> str:
    """Return a page whose table of presets is up to date."""
    return _PRESETS.sub(lambda block: f"{block[1]}\n{table()}\n\n{block[2]}", text)


def _refuse_missing(page: Path, *, key: str) -> None:
    if not page.is_file():
        raise SettingError(key, str(page), "a page that is there; docs/results.md is in a clone's folder")


def fill(text: str, folder: Path) -> str:
    """Return a page with its tables made anew from the CSV files in a folder."""
    return _BLOCK.sub(lambda block: block[1] + "\n" + render(block[2], folder) + "\n" + block[3], text)


def main() -> None:
    """Run a command; an error is one line."""
    try:
        app()
    except FedkdError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
