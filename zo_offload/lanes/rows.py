"""Rows of an embedding: which of them the waiting lanes ask for, and where each of their ids is among those.

An embedding that holds its table alone is served the rows in use, not the table, and is called with remapped ids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .serving import LaneRun, Served


def gather(
    served: Served,
    group: list[LaneRun],
    host_of: Callable[[Tensor], Tensor | None] | None = None,
    upload: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """Rows [U] that the lanes of a group ask for; each lane's ids become places among them.

    F.embedding checks padding_idx against the number of rows, so there are at least padding_idx + 1 (the last ones
    are row 0 again). Ids on a GPU are looked up on the host (`host_of`; `upload` brings back what was found), since to
    look at them there is to wait. Those that the host does not have (positions that the model counts out, say) are
    asked for one by one, repeats and all, or, where that is no fewer, all rows of the embedding: the same weights, and
    a row that does not exist comes as NaN.
    """
    ids = [lane.ids for lane in group if lane.ids is not None]
    assert len(ids) == len(group)
    device = ids[0].device
    known = [host_of(i) for i in ids] if host_of is not None and device.type != "cpu" else list(ids)
    if any(i is None for i in known):
        rows, places = unseen(ids, served.portions[0].shapes[0][0])
    else:
        rows, places = _unique(served, [i for i in known if i is not None])
        if device.type != "cpu":
            rows, places = upload(rows), upload(places)
    start = 0
    for lane, i in zip(group, ids, strict=True):
        lane.ids = places[start : start + i.numel()].view(i.shape)
        start += i.numel()
    padding = served.module.padding_idx
    return nn.functional.pad(rows, (0, max(0, (0 if padding is None else int(padding)) + 1 - rows.numel())))  # type: ignore[arg-type]


def unseen(ids: list[Tensor], num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows to ask for, and where each id is among them, without looking at the ids."""
    rows = torch.cat([i.reshape(-1) for i in ids]).long()
    if rows.numel() <= num_rows:
        return rows, torch.arange(rows.numel(), device=rows.device)
    places = torch.where((rows < 0) | (rows > num_rows), torch.full_like(rows, num_rows), rows)
    return torch.arange(num_rows + 1, device=rows.device), places  # the last one does not exist


def _unique(served: Served, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Different ids in order, and where each id is among them. IndexError for one the embedding does not have."""
    rows, places = torch.unique(torch.cat([i.reshape(-1) for i in ids]).long(), return_inverse=True)
    num_rows = served.portions[0].shapes[0][0]
    if rows.numel() and (int(rows[0]) < 0 or int(rows[-1]) >= num_rows):
        odd = int(rows[-1]) if int(rows[-1]) >= num_rows else int(rows[0])
        raise IndexError(f"id {odd} is out of range for {served.owner.name!r}, an embedding of {num_rows} rows")
    return rows, places
