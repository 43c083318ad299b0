"""The losses once more, in NumPy and SciPy at float64, straight from their definitions: what the tests compare with.

One sample at a time and by entropies and explicit sums, so that nothing of the library's way of computing is shared.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax
from scipy.stats import entropy

Array = NDArray[np.float64]


def soften(logits: Array, temperature: float) -> Array:
    return softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=-1)


def ce(q: Array, p: Array) -> float:
    return float(entropy(p) + rel_entr(p, q).sum())


def kl(q: Array, p: Array) -> float:
    return float(rel_entr(p, q).sum())


def reverse_kl(q: Array, p: Array) -> float:
    return kl(p, q)


def jeffreys(q: Array, p: Array) -> float:
    return kl(q, p) + kl(p, q)


def js(q: Array, p: Array) -> float:
    return float(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


def td(q: Array, p: Array) -> float:
    overlap = [2 * a * b / (a + b) for a, b in zip(p, q, strict=True) if a + b > 0]
    return 1.0 - float(np.sum(overlap))


def complexity(p: Array) -> float:
    return float(np.exp(entropy(p)))


def sed(q: Array, p: Array) -> float:
    return complexity((p + q) / 2) / np.sqrt(complexity(p) * complexity(q)) - 1


def msed(q: Array, teachers: Array) -> float:
    members = np.vstack([q[None], teachers])
    n = len(members)
    geometric_mean = np.prod([complexity(member) for member in members]) ** (1 / n)
    return (complexity(members.mean(axis=0)) / geometric_mean - 1) / (n - 1)


def decouple(q: Array, p: Array, strong: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    p_s, q_s = p[strong].sum(), q[strong].sum()
    bcd = rel_entr([p_s, p[~strong].sum()], [q_s, q[~strong].sum()]).sum()
    scd = rel_entr(p[strong] / p_s, q[strong] / q_s).sum()
    wcd = 0.0 if strong.all() else rel_entr(p[~strong] / p[~strong].sum(), q[~strong] / q[~strong].sum()).sum()
    return float(bcd), float(scd), float(wcd), float(p_s)


def balanced(q: Array, p: Array, delta: float, rule: str) -> float:
    forward, reverse = kl(q, p), kl(p, q)
    if rule == "none":
        return forward + reverse
    flat = entropy(q) > entropy(p)
    favour_reverse = flat if rule == "sharpen_if_flat" else not flat
    return forward + delta * reverse if favour_reverse else delta * forward + reverse


def flow(student: Array, teacher: Array, variant: str) -> tuple[float, float]:
    def conditionals(kernel: list[list[float]]) -> Array:
        rows = np.array(kernel)
        if variant == "paper":
            np.fill_diagonal(rows, 0.0)
        return rows / rows.sum(axis=1, keepdims=True)

    def cosine(x: Array) -> Array:
        unit = [a / (np.linalg.norm(a) + 1e-6) for a in x]
        return conditionals([[(a @ b + 1) / 2 for b in unit] for a in unit])

    def student_t(x: Array) -> Array:
        return conditionals([[1 / (1 + np.sqrt(((a - b) ** 2).sum() + 1e-6)) for b in x] for a in x])

    def divergence(p_t: Array, p_s: Array) -> float:
        total = rel_entr(p_t, p_s).sum() + rel_entr(p_s, p_t).sum()
        return float(total / (len(p_t) if variant == "paper" else len(p_t) ** 2))

    return divergence(cosine(teacher), cosine(student)), divergence(student_t(teacher), student_t(student))
