"""Your own data: a table, and models that know nothing of images.

    export PYTHONPATH=experiments/examples TABLE=$PWD/table.csv
    python -m own_table                                  # stands for the table that you have already
    fedkd run --peers 3 dataset=own_table:load models=mlp,own_table:linear proxy-size=100 pooled-model=mlp

A data source is a function without arguments that returns features [N, F] and labels [N] to train on, and the same to
test on. The run takes the public proxy set out of the training rows, splits the others over the peers, and scales every
feature by the proxy set's mean and deviation. Sites with a table each: `dataset=npz:site-{peer}.npz` and
`proxy=npz:public.npz`, with arrays `x_train`, `y_train`, `x_test`, `y_test`, and maybe `classes`.
"""

import os
from math import prod
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

CLASS = "target"


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return features and labels of the table, every fifth row to test on; words become a column per word."""
    table = pd.read_csv(os.environ["TABLE"]).dropna()
    features = pd.get_dummies(table.drop(columns=CLASS)).to_numpy(dtype=np.float32)
    labels = table[CLASS].astype("category").cat.codes.to_numpy(dtype=np.int64)
    test = np.arange(len(table)) % 5 == 0
    return features[~test], labels[~test], features[test], labels[test]


def linear(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a linear classifier, the other model beside `mlp`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), num_classes))


def main(path: Path) -> None:
    """Write a table of 569 tumours, 30 measurements each, benign or malignant."""
    from sklearn.datasets import load_breast_cancer

    load_breast_cancer(as_frame=True).frame.to_csv(path, index=False)


if __name__ == "__main__":
    main(Path(os.environ["TABLE"]))
