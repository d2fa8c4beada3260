"""A pool: one run, with members that come and go, on any number of hosts. Names in their store, and settings.

    keeper     has the run directory and the store, trains, and decides each step       keeper.py
    member     joins with the base and a few kilobytes of journal, at any time          member.py
    both       lease lanes of the current step and commit their losses                  sharing.py

A lane's loss is a function of the history and the lane, so any process may compute it, even two: the first committed
number counts. The keeper makes the step's record from the committed losses in the order of one process, writes its
journal, and publishes the record; members apply it. So all have the same bits at the same step, including late members,
and the processes need not agree on who is present.

Names in the store (values of `sealed.py`, but counters and claims), T being a step and its pass, "12.0":
    door, door/N        members' requests to join, and the answers: the journal, or the records that they lack
    T/next              number of leased lanes of a pass
    T/N, T/N/late       the loss of lane N; the member that took it over
    losses/T, decided/S the losses of a pass; the record of step S
    state, pulse        number of steps, shares, patience, excluded members; a counter that grows while the keeper lives
    member/M, beat/M    a member's message about itself, and its pulse
    roster, closed      present members, for people; that the run has ended, and why
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
"""The token's file in the keeper's run directory, if no other token was given."""
WAIT_S = 300.0
"""Seconds that a member looks for a keeper that does not answer."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A run that others may join: `Engine(..., ranks=Pool(address="0.0.0.0:29400", token=...), run_dir=...)`.

    address: where to listen; token: a secret that members must have too, of at least 8 characters. patience: seconds
    after which others compute a leased lane; None: derived from measured passes. audit: the share of other members'
    lanes that the keeper recomputes and compares; tolerance: the relative difference that their losses may have, for
    members with other arithmetic than the keeper (0: bit-equal).
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
        raise ConfigError(f"token: expected at least {LEAST_TOKEN} characters that are hard to guess")


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
    """A description of this process for people."""
    return f"{socket.gethostname()}:{os.getpid()}"
