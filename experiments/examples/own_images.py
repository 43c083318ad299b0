"""Your own data: a folder of images for every site.

    export PYTHONPATH=experiments/examples
    python -m own_images sites                           # stands for the folders that you have already
    fedkd run --peers 3 dataset=folder:sites/{peer} proxy=folder:sites/public

In `sites/0`, `sites/1`, ... every peer finds `train/CLASS/*.png` and `test/CLASS/*.png`, any format that Pillow reads.
All need the same folders of classes, if need be empty ones. The public proxy set is a folder of images, the same for
all; it needs no labels. Images of several sizes: `folder:PATH@64` resizes to 64 × 64.

Between real sites the same stands in each one's own `peer.toml`, and nobody else sees the path:

    dataset = "folder:/data/clinic"
    proxy = "folder:/data/public"
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fedkd.data.partition import partition
from fedkd.data.sources import Dataset, load_source


def main(root: Path, sites: int = 3, public: int = 200, train: int = 900, test: int = 150) -> None:
    """Write the folders of some sites, with different shares of the classes, and the public one."""
    source = load_source("digits", data_dir=Path())
    (root / "public").mkdir(parents=True)
    for number, image in enumerate(source.train.inputs[:public].numpy()):
        Image.fromarray(image[0]).save(root / "public" / f"{number:05}.png")
    private = source.train.subset(np.arange(public, min(public + train, len(source.train))))
    shares = partition(private.labels.numpy(), sites, "dirichlet", seed=0, alpha=0.5)
    for site, share in enumerate(shares):
        write(root / str(site) / "train", private.subset(share), source.classes)
        own = np.arange(site, len(source.test), sites)[:test]
        write(root / str(site) / "test", source.test.subset(own), source.classes)


def write(folder: Path, data: Dataset, classes: tuple[str, ...]) -> None:
    """Write grey images [N, 1, H, W] as `CLASS/NUMBER.png`."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(data.inputs.numpy(), data.labels.tolist(), strict=True)):
        Image.fromarray(image[0]).save(folder / classes[label] / f"{number:05}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
