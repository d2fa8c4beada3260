"""A pool: one run, and members that come and go, on any number of hosts. The store between them, and their settings.

    keeper     has the run directory and the store, trains, and decides each step       keeper.py
    member     joins with the base and a few kilobytes of journal, at any time          member.py
    both       lease lanes of the step under way and commit their losses                sharing.py

A lane's loss is a function of the history and the lane, so it does not matter who computes it, or that two do: the
first number that is committed counts. The keeper makes the step's record from the committed losses in the order of one
process, writes its journal, and tells the record; members apply it. So all have the same bits at the same step, those
that came late too, and nobody has to agree with anybody on who is there.

Names in the store (values of `sealed.py`, but counters and claims), T being a step and its pass, "12.0":
    door, door/N        members that ask to be let in, and the answer: the journal, or the records that they lack
    T/next              lanes of a pass that were leased
    T/N, T/N/late       the loss of lane N; who took it over
    losses/T, decided/S the losses of a pass; the record of step S
    state, pulse        how far the run is, shares, patience, who was put out; what grows while the keeper lives
    member/M, beat/M    what a member says of itself, and its pulse
    roster, closed      who is there, for people; that the run has ended, and why
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .line import parse

LEAST_TOKEN = 8
TOKEN = "token"
"""A keeper's file in its run directory, where no other token was given."""
WAIT_S = 300.0
"""How long a member looks for a keeper that is gone."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A run that others may join: `Engine(..., ranks=Pool(address="0.0.0.0:29400", token=...), run_dir=...)`.

    address: where to listen; token: what members must have too, of 8 characters at least. patience: seconds after which
    lanes that somebody leased are done by others; None: learnt from what passes took. audit: the share of other
    members' lanes that the keeper computes again and compares; tolerance: by how much of a loss they may differ, for
    members whose arithmetic is not the keeper's (0: by no bit).
    """

    address: str
    token: str
    patience: float | None = None
    audit: float = 0.02
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        parse(self.address)
        check_token(self.token)
        check_patience(self.patience)
        if not 0 <= self.audit <= 1:
            raise ConfigError(f"audit={self.audit}: expected a share, 0 .. 1")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance}: expected a part of a loss, 0 .. 1")


def check_token(token: str) -> None:
    if not isinstance(token, str) or len(token) < LEAST_TOKEN:
        raise ConfigError(f"token: expected at least {LEAST_TOKEN} characters that nobody guesses")


def check_patience(patience: float | None) -> None:
    if patience is not None and not patience > 0:
        raise ConfigError(f"patience={patience}: expected seconds, more than 0")


def read_token(path: str | Path) -> str:
    """A token from its file. Raises ConfigError."""
    try:
        token = Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the token's file {str(path)!r} cannot be read: {error}") from None
    check_token(token)
    return token


def here() -> str:
    """This process, for people."""
    return f"{socket.gethostname()}:{os.getpid()}"
