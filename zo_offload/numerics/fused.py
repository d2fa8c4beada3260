"""The fused pass: decode, apply pending updates, store back, emit perturbed weights; one visit of the bytes.

The arithmetic, for each element, in float32, in this order:

    w = decode(stored)                                       join(stored, residual) if split and any update folds
    for each update:    mask = mask of w                     if it is by magnitude and the update begins a step
                        w = w * decay                        unless decay == 1
                        w = fma(-coeff, z(seed), w)          unless coeff == 0; both where the mask has the element
                        w = decode(encode(w))                if fold; of a split format, the master's value
    stored = the bytes of the last fold                      if write_back and any update folds
    w = decode(stored)                                       after the last fold, if split: lanes see the coarse plane
    mask = mask of w                                         if it is by magnitude
    for each lane j:    out_j = round(fma(scale_j, z_j, w))             (w itself if scale_j == 0, or not in the mask)

    z_j = z(seed_j); or, for a lane along a sum of noises, d: from d = 0, for each of its terms in order,
                        d = fma(coeff, z(seed), d)           unless coeff == 0

`encode` rounds to nearest, or stochastically with random bits that are a function of (update seed, parameter,
element). So the stored value after a step is a function of the first value and the updates alone, never of the times of
visits: several pending updates in one call equal one call for each, bit for bit. Lanes see the stored value, plus any
trailing updates that do not fold. A format with groups decides at each fold, from the
group's values and its scale, whether the scale changes.

target="scales" trains the float32 scales of the groups instead (QZO): in the lines above w is a group's scale, z's
element index the group's, an update ends with w = max(w, 1e-7), folding rounds nothing, and an output is made from the
element's code with its group's scale perturbed by the lane. Values, minima and centres are only read.

This module checks calls; `fused_kernels.py` runs them. The native library computes a cache-sized tile at a time;
without it `reference.py` computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from ..errors import ConfigError
from ..formats import Format
from ..kernels.device_updates import DeviceUpdates
from ..kernels.records import Mask, Perturbation, Rounding, Target, Update, sums_of
from .calls import Mark, PassCall, Ready
from .fused_kernels import kernels_for
from .noise import NoiseSpec

_ROUNDINGS, _TARGETS = get_args(Rounding), get_args(Target)


def fused_pass(
    stored: Tensor,
    fmt: Format,
    *,
    param_id: int,
    numel: int,
    offset: int = 0,
    updates: Sequence[Update] | DeviceUpdates = (),
    write_back: bool = True,
    rounding: Rounding = "nearest",
    noise: NoiseSpec,
    perturbations: Sequence[Perturbation] = (),
    outs: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    target: Target = "values",
    master: bool = False,
    mask: Mask | None = None,
    threads: int | None = None,
    mark: Mark | None = None,
) -> None:
    """Run the pass above over `numel` consecutive elements of one parameter.

    Args:
        stored: uint8, 1-D, contiguous, `fmt.nbytes(numel)` long: the streamed part; changed in place by a write-back.
        offset: index of the first of these elements in the parameter, so a slice gets its own noise. A multiple of
            `fmt.group`: groups are counted from the parameter's first element.
        residual: for a split format, uint8, `fmt.residual_nbytes(numel)` long; changed with `stored`. May be left out
            if no update folds: then it is neither read nor written.
        master: outs are made from both parts of a split format (evaluation); no update may fold; needs `residual`.
        outs: one contiguous tensor per perturbation, `numel` elements of float32, bfloat16 or float16; may not overlap
            `stored` or each other. Consecutive perturbations of one seed, or along one sum, share one z.
        threads: of the native library; default torch.get_num_threads(). Does not change the result.
        mark: tells afterwards, even after an exception, whether `stored` was changed.
        mask: the elements that updates and lanes change; None: all.
    Raises ConfigError on sizes, dtypes or devices that do not fit together.

    With `stored` on a GPU the CUDA kernels run, on torch's current stream, and this returns at once; updates may then
    be `DeviceUpdates`, whose coefficients the host need not know.
    """
    _check_lanes(perturbations, outs)
    call = _pass_call(
        stored, fmt, param_id=param_id, numel=numel, offset=offset, rounding=rounding, noise=noise, outs=outs,
        threads=threads, target=target, master=master, mask=mask,
    )  # fmt: skip
    call.residual = _residual(residual, fmt, numel, _folds(updates), target, stored.device, master, mask)
    call.updates, call.write_back, call.perturbations = updates, write_back, perturbations
    kernels_for(stored, fmt, noise).run_pass(call, mark if mark is not None else Mark())


def ready_pass(
    stored: Tensor,
    fmt: Format,
    *,
    param_id: int,
    numel: int,
    offset: int,
    rounding: Rounding,
    noise: NoiseSpec,
    outs: Sequence[Tensor],
    residual: Tensor | None,
    target: Target,
    mask: Mask | None,
    threads: int | None,
) -> PassCall:
    """The constant arguments of repeated `fused_pass` calls, checked as there, for `ready_passes`.

    residual: for updates that fold; None: there is none, and no update of a split format may fold.
    """
    call = _pass_call(
        stored, fmt, param_id=param_id, numel=numel, offset=offset, rounding=rounding, noise=noise, outs=outs,
        threads=threads, target=target, master=False, mask=mask,
    )  # fmt: skip
    folds = residual is not None and target == "values"
    call.residual = _residual(residual, fmt, numel, folds, target, stored.device, False, mask)
    return call


def ready_passes(calls: Sequence[PassCall]) -> Ready | None:
    """`fused_pass` of all these parameters as one call that can be repeated: `run` takes the arguments that change, and
    gives the same bits. None if kernels are called one by one. Holds addresses, not memory."""
    kinds = {type(kernels_for(call.stored, call.fmt, call.noise)) for call in calls}
    return kernels_for(calls[0].stored, calls[0].fmt, calls[0].noise).ready(calls) if len(kinds) == 1 else None


def fused_rows(
    stored: Tensor,
    fmt: Format,
    *,
    param_id: int,
    row_numel: int,
    rows: Tensor,
    numel: int | None = None,
    first_row: int = 0,
    total_rows: int | None = None,
    updates: Sequence[Update] | DeviceUpdates = (),
    rounding: Rounding = "nearest",
    noise: NoiseSpec,
    perturbations: Sequence[Perturbation],
    outs: Sequence[Tensor],
    residual: Tensor | None = None,
    target: Target = "values",
    master: bool = False,
    mask: Mask | None = None,
    threads: int | None = None,
) -> None:
    """The same arithmetic for gathered rows of a parameter; nothing is written back. For embeddings.

    Args:
        stored: uint8, the streamed part of the parameter, rows of `row_numel` elements, or of a piece of it.
        rows: int64 [U], contiguous; row indices in the parameter, in any order, repeats allowed.
        numel: elements in `stored`; needed if `fmt` has groups, else it follows from the bytes.
        first_row: the piece's first row in the parameter. The kernel skips rows outside the piece, and leaves their
            part of `outs` unchanged: the host need not read the rows.
        total_rows: of the whole parameter; default: the rows in `stored`.
        outs: one contiguous [U, row_numel] tensor per perturbation.
    Raises ConfigError like `fused_pass`, and on a row outside the parameter. On a GPU such a row becomes NaN.
    """
    if numel is None:
        numel = fmt.size_of(stored, None)
    if row_numel <= 0 or numel % row_numel:
        raise ConfigError(
            f"{numel} elements ({stored.numel()} stored bytes) are not a whole number of {row_numel}-element "
            f"{fmt.name} rows"
        )
    total_rows = numel // row_numel if total_rows is None else total_rows
    offset = first_row * row_numel
    if first_row < 0 or offset + numel > total_rows * row_numel:
        raise ConfigError(
            f"rows {first_row}..{first_row + numel // row_numel - 1} are stored of a parameter with {total_rows} rows"
        )
    _check_stored(stored, fmt, numel)
    _check_lanes(perturbations, outs)
    _check_call(param_id, offset, numel, rounding, outs, stored.device)
    if fmt.group and offset % fmt.group:
        raise ConfigError(f"first_row={first_row}: {fmt.name} has groups of {fmt.group}, start at one's first element")
    if rows.dtype != torch.int64 or rows.dim() != 1 or not rows.is_contiguous() or rows.device != stored.device:
        raise ConfigError(
            f"rows: need a contiguous 1-D int64 tensor on {stored.device}, got {rows.dtype} {tuple(rows.shape)} on "
            f"{rows.device}"
        )
    count = rows.numel()
    for out in outs:
        if out.numel() != count * row_numel:
            raise ConfigError(f"an output of shape {tuple(out.shape)} cannot hold {count} rows of {row_numel} elements")
    residual = _residual(residual, fmt, numel, _folds(updates), target, stored.device, master, mask)
    if count == 0:
        return
    call = PassCall(
        stored=stored, residual=residual, fmt=fmt, numel=numel, offset=offset, param_id=param_id, updates=updates,
        write_back=False, stochastic=rounding == "stochastic", noise=noise, perturbations=perturbations, outs=outs,
        target_scales=target == "scales", threads=threads, master=master, mask=mask, rows=rows,
        row_numel=row_numel, total_rows=total_rows,
    )  # fmt: skip
    kernels_for(stored, fmt, noise).run_pass(call, Mark())


def _pass_call(
    stored: Tensor,
    fmt: Format,
    *,
    param_id: int,
    numel: int,
    offset: int,
    rounding: Rounding,
    noise: NoiseSpec,
    outs: Sequence[Tensor],
    threads: int | None,
    target: Target,
    master: bool,
    mask: Mask | None,
) -> PassCall:
    """A pass over consecutive elements, checked except for updates, perturbations and residual."""
    _check_stored(stored, fmt, numel)
    _check_call(param_id, offset, numel, rounding, outs, stored.device)
    if fmt.group and offset % fmt.group:
        raise ConfigError(f"offset={offset}: {fmt.name} has groups of {fmt.group}, start at a multiple of that")
    for out in outs:
        if out.numel() != numel:
            raise ConfigError(f"an output of shape {tuple(out.shape)} cannot hold the {numel} elements of this pass")
    return PassCall(
        stored=stored, residual=None, fmt=fmt, numel=numel, offset=offset, param_id=param_id, updates=(),
        write_back=False, stochastic=rounding == "stochastic", noise=noise, perturbations=(), outs=outs,
        target_scales=target == "scales", threads=threads, master=master, mask=mask,
    )  # fmt: skip


def _check_lanes(perturbations: Sequence[Perturbation], outs: Sequence[Tensor]) -> None:
    if len(perturbations) != len(outs):
        raise ConfigError(f"{len(perturbations)} perturbations but {len(outs)} outputs: give one tensor a perturbation")
    if not all(terms.is_known for terms in sums_of(perturbations)):
        raise ConfigError("a lane is perturbed along a sum whose coefficients are not known: give the sum's `coeffs`")


def _folds(updates: Sequence[Update] | DeviceUpdates) -> bool:
    return any(updates.folds if isinstance(updates, DeviceUpdates) else (update.fold for update in updates))


def _check_stored(stored: Tensor, fmt: Format, numel: int) -> None:
    size = fmt.nbytes(numel) if numel > 0 else 0
    if stored.dtype != torch.uint8 or stored.dim() != 1 or not stored.is_contiguous() or stored.numel() != size:
        raise ConfigError(
            f"stored: {numel} {fmt.name} elements are {size} bytes in a contiguous 1-D uint8 tensor, got "
            f"{stored.dtype} {tuple(stored.shape)} with strides {stored.stride()}"
        )


def _residual(
    residual: Tensor | None,
    fmt: Format,
    numel: int,
    folds: bool,
    target: str,
    device: torch.device,
    master: bool,
    mask: Mask | None,
) -> Tensor | None:
    """The residual part if this pass uses it, else None; ConfigError if it is missing or has a wrong size or dtype."""
    if target not in _TARGETS:
        raise ConfigError(f"target={target!r}: choose one of {_TARGETS}")
    if mask is not None and mask.kind == "listed" and (mask.elements is None or mask.elements.device != device):
        where = "not here" if mask.elements is None else f"on {mask.elements.device}"
        raise ConfigError(f"the list of a mask's {mask.limit} elements is {where}: bring it to {device}")
    if mask is not None and target == "scales":
        raise ConfigError("target='scales': a mask is of values; the scales of groups have none")
    if master and folds:
        raise ConfigError("master: an update that folds changes the stored bytes; fold first, in a pass of its own")
    folds = folds or master
    if target == "scales":
        if not fmt.trains_scales:
            raise ConfigError(f"target='scales': {fmt.name} has no float32 scales to train")
        return None
    if folds and not master and not fmt.trains:
        raise ConfigError(f"{fmt.name} values are never rewritten: an update of them cannot fold")
    size = fmt.residual_nbytes(numel)
    if residual is None:
        if size and folds:
            does = "decodes" if master else "folds an update into"
            raise ConfigError(f"{fmt.name} {does} both parts of a weight: give its residual too")
        return None
    if (residual.dtype, residual.dim(), residual.numel()) != (torch.uint8, 1, size) or residual.device != device:
        raise ConfigError(
            f"residual: {numel} {fmt.name} elements have {size} bytes in a contiguous 1-D uint8 tensor on {device}, "
            f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )
    if not residual.is_contiguous():
        raise ConfigError(f"residual: must be contiguous, has strides {residual.stride()}")
    return residual if size and folds else None


def _check_call(
    param_id: int,
    offset: int,
    numel: int,
    rounding: str,
    outs: Sequence[Tensor],
    device: torch.device,
) -> None:
    if not 0 <= param_id < 1 << 32:
        raise ConfigError(f"param_id={param_id}: must be >= 0 and < 2**32")
    if numel < 0 or offset < 0 or offset + numel > 1 << 62:
        raise ConfigError(f"elements [{offset}, {offset} + {numel}): need 0 <= offset and offset + numel <= 2**62")
    if rounding not in _ROUNDINGS:
        raise ConfigError(f"rounding={rounding!r}: choose one of {_ROUNDINGS}")
    for out in outs:
        if out.device != device or not out.is_contiguous():
            raise ConfigError(
                f"an output is on {out.device} with strides {out.stride()}: must be contiguous and on {device}"
            )
