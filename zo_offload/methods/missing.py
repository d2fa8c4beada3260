"""Published methods that have another name here, and those that are not here, with the reason.

A name that somebody has read in a paper is answered by more than "not known": `--method hizoo` says why there is none.
`zo-offload methods` prints both lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Missing:
    """names: as published; the first is printed."""

    names: tuple[str, ...]
    why: str


ELSEWHERE = {
    "zo-sgd": "mezo", "spsa": "mezo", "n-spsa": "nspsa", "spsa-n": "nspsa", "1.5-spsa": "spsa-1.5", "zo-sign": "sign",
    "zo-signsgd": "sign", "zo-mmt": "momentum", "mezo-momentum": "momentum", "zo-cons": "conservative",
    "zo-rankSGD": "rank", "smezo": "sparse-mezo", "fzoo-reuse": "fzoo-r", "fedkseed": "seed-pool",
}  # fmt: skip
"""Published name -> name here."""

MISSING = (
    Missing(
        ("HiZOO", "HiZOO-L"),
        "its curvature is a plane as large as the weights, read and written at every visit: the streamed bytes would "
        "double. One number per parameter instead of per weight carries no information, since one probe gives every "
        "parameter the same curvature, up to the deviation of its mean z^2 from 1",
    ),
    Missing(
        ("ZO-Adam", "ZO-AdaMM", "AdaMeZO", "MeZO-Adam"),
        "two planes, or a root and a quotient of two sums of noises in each kernel; meazo has one adaptive rate, and "
        "its paper finds that a well-tuned SGD is as good",
    ),
    Missing(
        ("DeepZero", "CGE", "ZO-GraSP"),
        "a forward per coordinate, or per group of weights for its scores: for models of thousands of weights. A list "
        "of weights from elsewhere trains with senszoq --mask-file",
    ),
    Missing(
        ("block-wise ZO", "AdaLeZO", "ZO-block"),
        "a pair of forwards a block, or a choice that learns from the losses. lezo is here, and one layer alone is "
        "--trainable model.layers.1",
    ),
    Missing(
        ("LOZO-M", "SubZero", "EGGROLL", "ZO-Muon", "ZO-Act", "GRZO"),
        "of directions of low rank there is lozo: no momentum of a factor, no orthogonal factors, and no direction for "
        "each row of a batch. An adapter in a basis of the layers' own inputs trains few directions of each layer: "
        "zo-offload basis",
    ),
    Missing(
        ("forward gradient", "forward-grad"),
        "a tangent of each activation: twice the memory, and forwards of their own for each direction",
    ),
    Missing(
        ("hybrid ZO-FO",),
        "it is no method, but an option of each: --tail classifier trains what is used last by its exact gradient, and "
        "the method's lanes train the rest",
    ),
    Missing(
        ("ZeroQAT", "QuZO", "QES"),
        "lanes that see rounded weights, or errors kept beside codes: not built. qzo trains the scales of an int4, nf4 "
        "or int8 base",
    ),
    Missing(
        ("line search",), "lanes cannot be added once a step's losses are known; conservative compares three points"
    ),
)


def answer(name: str) -> str | None:
    """What to say of a published name that is no method here: its name here, or why it is missing."""
    wanted = _plain(name)
    for published, here in ELSEWHERE.items():
        if _plain(published) == wanted:
            return f"{published} is method {here!r} here"
    for missing in MISSING:
        if wanted in map(_plain, missing.names):
            return f"{name} is not here: {missing.why}"
    return None


def check(name: str) -> None:
    """Raise ConfigError with what is to say of a published name that is no method here."""
    if told := answer(name):
        raise ConfigError(f"method {name!r}: {told}")


def lines() -> Iterator[str]:
    """One line per name or group of names."""
    for published, here in ELSEWHERE.items():
        yield f"{published}: --method {here}"
    for missing in MISSING:
        yield f"{', '.join(missing.names)}: not here. {missing.why[0].upper()}{missing.why[1:]}"


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
