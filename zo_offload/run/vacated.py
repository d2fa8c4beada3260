"""A model whose weights are in a run: how it is emptied, and how it gets them back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..devices.placing import Homes, move_what_stays
from ..lanes.hollow import hollow
from ..modules.away import Away
from ..modules.parameters import untie
from ..stream.ingest import ModuleBase, load_kept
from ..system.closing import Closing
from .opening import Opened


class Vacated:
    """The model of one run. `leave` and the ways back may be broken off and called again."""

    def __init__(self, opened: Opened) -> None:
        self._opened, self._params = opened, opened.prepared.plan.params
        self._ties = opened.ties
        self._homes: Homes | None = None
        self._away: Away | None = None

    def leave(self, closing: Closing) -> None:
        """Parameters are hollow, what stays is on the device that computes, and a guard is on the model.

        closing: gets what tells the guard that the run is closed.
        """
        model, device = self._opened.model, self._opened.device.torch_device
        self._homes = Homes(model)
        kept = set(self._opened.prepared.plan.tree.kept.values())
        load_kept(model, kept, self._opened.base)
        hollow(model, device, self._params)
        move_what_stays(model, device, kept)
        self._away = Away(model, self._params)
        closing.add(self._away.close)

    def undo(self) -> None:
        """The model as it was before `leave`, which may have been broken off; its base still has the values."""
        self._lift_guard()
        base = self._opened.base
        if isinstance(base, ModuleBase) and self._homes is not None and base.values:
            self._homes.bring_back(self._opened.model, {name: base.values[name] for name in self._params})
        self._homes = None

    def bring_back(self, values: Mapping[str, Tensor]) -> None:
        """Values into the parameters, where they were."""
        assert self._homes is not None
        self._lift_guard()
        self._homes.bring_back(self._opened.model, values)

    def hand_back(self) -> nn.Module:
        """The module as it was given, its own names for what is shared included."""
        untie(self._opened.model, self._ties)
        self._ties = ()
        return self._opened.given if self._opened.given is not None else self._opened.model

    def _lift_guard(self) -> None:
        if self._away is not None:
            self._away.lift()
            self._away = None
