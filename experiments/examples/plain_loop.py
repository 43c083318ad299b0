"""The losses alone, in a plain PyTorch loop: no Flower, no settings, no fedkd but two functions.

Three models that know different digits teach one another on samples that nobody labelled. In a clone:
`python -m experiments.examples.plain_loop`.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedkd.losses import js
from fedkd.metrics import accuracy


def fit(model: nn.Module, inputs: Tensor, labels: Tensor, epochs: int) -> None:
    """Learn from labels [N] of inputs [N, D]."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()


def distil(student: nn.Module, inputs: Tensor, teacher_logits: Tensor, epochs: int) -> None:
    """Learn what other models say about inputs [P, D]: logits [P, C] are all that has to travel."""
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            js(student(inputs[batch]), teacher_logits[batch], temperature=1.0).mean().backward()
            optimizer.step()


def main(rounds: int = 3) -> list[list[float]]:
    """Return, and print, the models' test accuracies after each round, [round][model]."""
    torch.manual_seed(0)
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    test, proxy, private = torch.randperm(len(labels)).split([400, 400, len(labels) - 800])
    known = [[0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 9], [7, 8, 9, 0, 1, 2]]
    parts = [private[torch.isin(labels[private], torch.tensor(own))] for own in known]
    models = [nn.Sequential(nn.Linear(64, h), nn.ReLU(), nn.Linear(h, 10)) for h in (32, 64, 128)]
    for model, part in zip(models, parts, strict=True):
        fit(model, inputs[part], labels[part], epochs=20)
    found = []
    for round in range(rounds + 1):
        if round:
            knowledge = torch.stack([model(inputs[proxy]).detach() for model in models])
            together = knowledge.softmax(dim=-1).mean(dim=0).log()
            for student in models:
                distil(student, inputs[proxy], together, epochs=10)
        found.append([accuracy(model(inputs[test]), labels[test]) for model in models])
        print(f"round {round}: " + "  ".join(f"{value:.1%}" for value in found[-1]))
    return found


if __name__ == "__main__":
    main()
