"""A model whose weights are in a run: empties the model, and gives it its weights back."""

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
    """The model of one run. All methods may be interrupted and called again."""

    def __init__(self, opened: Opened) -> None:
        self._opened, self._params = opened, opened.prepared.plan.params
        self._ties = opened.ties
        self._homes: Homes | None = None
        self._away: Away | None = None

    def leave(self, closing: Closing) -> None:
        """Make the parameters hollow, move buffers to the compute device, and put a guard on the model.

        closing: gets the call that tells the guard that the run is closed.
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
        """Restore the model to its state before `leave`, which may be incomplete; its base still has the values."""
        self._lift_guard()
        base = self._opened.base
        if isinstance(base, ModuleBase) and self._homes is not None and base.values:
            self._homes.bring_back(self._opened.model, {name: base.values[name] for name in self._params})
        self._homes = None

    def bring_back(self, values: Mapping[str, Tensor]) -> None:
        """Put values into the parameters, on the devices where they were."""
        assert self._homes is not None
        self._lift_guard()
        self._homes.bring_back(self._opened.model, values)

    def hand_back(self) -> nn.Module:
        """The module as it was given, with its own names for shared parameters."""
        untie(self._opened.model, self._ties)
        self._ties = ()
        return self._opened.given if self._opened.given is not None else self._opened.model

    def _lift_guard(self) -> None:
        if self._away is not None:
            self._away.lift()
            self._away = None
