"""Your own divergence.

    export PYTHONPATH=experiments/examples
    fedkd run divergence=own_divergence:squared_hellinger temperature=2.0

A divergence is a function from student and teacher logits [B, C] to one number per sample [B]; its gradient is
autograd's. `@register` gives it a name, `get("squared_hellinger")`, and says what is known of it: the program itself
needs only the function, as `package.module:function`. Peers combine several teachers with it, match its gradients and
search its temperature like any other's.
"""

import torch
from torch import Tensor

from fedkd.losses import register


@register("squared_hellinger", bound=1.0, symmetric=True, root_is_metric=True)
def squared_hellinger(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Squared Hellinger distance, 1 − Σ √(p·q), bounded by 1.  [B, C], [B, C] -> [B], dimensionless.

    Source: Hellinger 1909; the Bhattacharyya coefficient is one minus it.

    >>> squared_hellinger(torch.zeros(1, 2), torch.tensor([[0.0, 40.0]]))
    tensor([0.2929])
    """
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    return 1 - ((log_p + log_q) / 2).exp().sum(dim=-1)


def main() -> None:
    """Let one row of logits learn from another and print how far apart they are."""
    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    student = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.SGD([student], lr=2.0)
    for step in range(101):
        loss = squared_hellinger(student, teacher).mean()
        if step % 25 == 0:
            print(f"step {step:>3}: {loss.item():.6f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
