"""Rows of an embedding: the rows that the waiting lanes look up, and each id's index among them.

An embedding with no other parameter than its table is served only the rows in use, and is called with remapped ids.
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
    """Rows [U] that the lanes of a group look up; each lane's ids become indices into them.

    F.embedding checks padding_idx against the number of rows, so there are at least padding_idx + 1 rows (the last ones
    repeat row 0). Ids on a GPU are read from the host's copy (`host_of`; `upload` copies the result back), since
    reading them on the GPU would wait. Ids without a host copy (positions that the model computes, say) are looked up
    one by one, with repeats, or, if that is no fewer, all rows of the embedding are used: the weights are the same, and
    a row that does not exist is NaN.
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
    """Rows to look up, and each id's index among them, without reading the ids."""
    rows = torch.cat([i.reshape(-1) for i in ids]).long()
    if rows.numel() <= num_rows:
        return rows, torch.arange(rows.numel(), device=rows.device)
    places = torch.where((rows < 0) | (rows > num_rows), torch.full_like(rows, num_rows), rows)
    return torch.arange(num_rows + 1, device=rows.device), places  # the last one does not exist


def _unique(served: Served, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The distinct ids in order, and each id's index among them. Raises IndexError for an id out of range."""
    rows, places = torch.unique(torch.cat([i.reshape(-1) for i in ids]).long(), return_inverse=True)
    num_rows = served.portions[0].shapes[0][0]
    if rows.numel() and (int(rows[0]) < 0 or int(rows[-1]) >= num_rows):
        odd = int(rows[-1]) if int(rows[-1]) >= num_rows else int(rows[0])
        raise IndexError(f"id {odd} is out of range for {served.owner.name!r}, an embedding of {num_rows} rows")
    return rows, places
