"""One round after another in plain PyTorch, float32 and without tricks: what somebody writes who has no library.

The opponent of `fedkd bench loop`, run as a process of its own so that its CPU seconds are its own. It prints one line
of JSON: the CPU and wall seconds of every round, and the mean test accuracy after the last.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.models import build


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description="Federated distillation as a plain loop.")
    parser.add_argument(
        "data", type=Path, help="npz file: x_train [N, H, W] or [N, H, W, C] uint8, y_train, x_test, y_test"
    )
    parser.add_argument("--models", required=True)
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--proxy", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    data = np.load(given.data)
    x, x_test = (images(data[name]).to(given.device) for name in ("x_train", "x_test"))
    y, y_test = (torch.from_numpy(data[name]).to(given.device) for name in ("y_train", "y_test"))
    order = torch.randperm(len(x))
    proxy, own = x[order[: given.proxy]], order[given.proxy :].chunk(given.peers)
    names = given.models.split(",")
    models = [
        build(names[i % len(names)], input_shape=tuple(x.shape[1:]), num_classes=10, seed=100 * given.seed + i).to(x)
        for i in range(given.peers)
    ]
    for model, mine in zip(models, own, strict=True):
        train(model, x[mine], y[mine], given.batch)
    known = [predict(model, proxy, given.batch) for model in models]
    cpu, wall, accuracies = [], [], []
    for _ in range(given.rounds):
        began = time.process_time(), time.monotonic()
        accuracies, fresh = [], []
        for i, (model, mine) in enumerate(zip(models, own, strict=True)):
            others = [logits.softmax(dim=1) for j, logits in enumerate(known) if j != i]
            distil(model, proxy, torch.stack(others).mean(dim=0), given.batch)
            train(model, x[mine], y[mine], given.batch)
            accuracies.append((predict(model, x_test, given.batch).argmax(dim=1) == y_test).float().mean().item())
            fresh.append(predict(model, proxy, given.batch))
        known = fresh
        cpu.append(time.process_time() - began[0])
        wall.append(time.monotonic() - began[1])
    print(json.dumps({"cpu_seconds": cpu, "seconds": wall, "accuracy": sum(accuracies) / len(accuracies)}))


def images(pixels: np.ndarray) -> Tensor:
    """Return pixels ``[N, H, W]`` or ``[N, H, W, C]`` as standardised images ``[N, C, H, W]``."""
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
    return (scaled - scaled.mean()) / scaled.std()


def train(model: nn.Module, x: Tensor, y: Tensor, size: int) -> None:
    """Go through the private data once."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for batch in torch.randperm(len(x)).split(size):
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def distil(model: nn.Module, x: Tensor, teacher: Tensor, size: int) -> None:
    """Go through the proxy set once, towards the teacher's probabilities."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for batch in torch.randperm(len(x)).split(size):
        loss = F.kl_div(F.log_softmax(model(x[batch]), dim=1), teacher[batch], reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def predict(model: nn.Module, x: Tensor, size: int) -> Tensor:
    """Return the logits of all samples."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch) for batch in x.split(size)])


if __name__ == "__main__":
    main()
