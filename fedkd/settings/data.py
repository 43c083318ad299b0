"""What peers know, and what they share."""

from dataclasses import dataclass
from typing import ClassVar

from fedkd.settings.declare import BOOKKEEPING, DATA, FREE, MACHINE, PATH, SOURCE, Condition, setting
from fedkd.settings.rules import ANY, CHANNELS, NON_EMPTY, above, at_least, one_of

SPLIT_SIZE = 400
"""How many samples `split` takes out of the training set unless a number is given."""
PARTITIONS = ("iid", "dirichlet", "classes", "overlap", "quantity")


@dataclass(frozen=True)
class Data:
    """What peers know, and what they share."""

    title: ClassVar[str] = "What the peers know and what they share"

    dataset: str = setting(
        "digits",
        NON_EMPTY,
        "`digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `svhn`, `npz:PATH`, `folder:PATH`, `parquet:PATH`, "
        "`hf:NAME_OR_PATH` or `package.module:function`; with `{peer}` in a path each peer, by its number, has data of "
        "its own",
        decides=DATA,
        opens=SOURCE,
        own="dataset",
    )
    data_dir: str = setting(
        "",
        ANY,
        "folder where torchvision's data sets lie; empty: `~/.cache/fedkd/data`",
        decides=MACHINE,
        opens=PATH,
        own="data-dir",
    )
    download: bool = setting(
        False,
        ANY,
        "let a missing data set be fetched, of torchvision's or from Hugging Face's hub",
        decides=BOOKKEEPING,
    )
    partition: str = setting(
        "dirichlet", one_of(*PARTITIONS), "how the training set is split over the peers", decides=DATA
    )
    partition_alpha: float = setting(
        0.3,
        above(0),
        "concentration of `dirichlet`: small is skewed",
        decides=DATA,
        takes=Condition("partition dirichlet", lambda c: c.partition == "dirichlet"),
        costs=FREE,
    )
    classes_per_peer: int = setting(
        2,
        at_least(1),
        "classes a peer holds under `classes`",
        decides=DATA,
        takes=Condition("partition classes", lambda c: c.partition == "classes"),
        costs=FREE,
    )
    shared_classes: int = setting(
        2,
        at_least(1),
        "classes every peer holds under `overlap`",
        decides=DATA,
        takes=Condition("partition overlap", lambda c: c.partition == "overlap"),
        costs=FREE,
    )
    proxy: str = setting(
        "split",
        NON_EMPTY,
        "`split`: public images taken from the training set before partitioning; or a data source, also without labels",
        decides=DATA,
        opens=SOURCE,
        own="proxy",
    )
    proxy_size: int = setting(
        0,
        at_least(0),
        f"samples of the public proxy set; 0: all of one of its own, {SPLIT_SIZE} of `split`",
        decides=DATA,
        costs="max-proxy-size",
    )
    image_size: int = setting(
        0,
        at_least(0),
        "side in pixels of the squares to which all images are resized, private, test and proxy ones; 0: as they are",
        decides=DATA,
        costs="max-image-size",
    )
    image_channels: int = setting(
        0, CHANNELS, "1: all images become grey, 3: RGB; 0: as the private ones are", decides=DATA, costs=FREE
    )
    normalize: str = setting(
        "auto",
        one_of("auto", "proxy", "imagenet", "symmetric", "none"),
        "input scaling: `proxy` takes mean and deviation from the proxy set; so does `auto`, unless a model's own "
        "description says them; `symmetric` makes -1 to 1 of 8-bit pixels, `none` 0 to 1",
        decides=DATA,
    )
