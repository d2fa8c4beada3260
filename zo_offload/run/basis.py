"""The main directions of the inputs of a model's linear layers: a basis for adapters (`checkpoint.basis`).

    with Engine("base/", storage="int4", method=QZO()) as engine:
        engine.activation_basis(batch, rank=4).save("basis/")
    Engine("base/", adapter="basis/", trainable="lora_B", keep="lora_A", storage="int4", method=FZOO.preset("basis"))

For each layer, the top right singular vectors of its inputs x [tokens, in] over one batch: one forward pass, weights
streamed as in any other. Padding is left out where the batch has an attention_mask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.basis import Basis
from ..data.losses import Batch
from ..errors import ConfigError
from ..modules.kind import unwrapped
from ..modules.tree import select_names
from .active import Run

_MOST = 2048  # tokens of a batch that are used, at most
_KEPT = 8  # times the rank: directions kept for a layer that is called several times


def activation_basis(run: Run, batch: Batch, rank: int = 4, *, layers: str | Collection[str] | None = None) -> Basis:
    """See `Engine.activation_basis`."""
    if rank < 1:
        raise ConfigError(f"rank={rank}: expected at least 1")
    chosen = _layers(run, layers)
    seen: dict[str, Tensor] = {}
    shared: dict[str, Any] = {}  # the inputs that were reduced last: neighbouring layers often share them

    def watch(path: str, mask: Any) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if shared.get("of") is not x:
                shared.update(of=x, rows=_reduced(_rows(x, mask), _KEPT * rank))
            rows = shared["rows"]
            seen[path] = _reduced(torch.cat([seen[path], rows]), _KEPT * rank) if path in seen else rows

        return hook

    def call(model: nn.Module, placed: Batch) -> None:
        mask = placed.get("attention_mask")
        handles = [module.register_forward_pre_hook(watch(path, mask)) for path, module in chosen.items()]
        try:
            model(**placed)
        finally:
            for handle in handles:
                handle.remove()

    run.forward(batch, call)
    shared.clear()
    vectors = {}
    for path, rows in seen.items():
        wanted = min(rank, chosen[path].in_features)
        norms = rows.norm(dim=1, keepdim=True)
        if len(rows) < wanted or not bool((norms[:wanted] > 0).all()):
            raise ConfigError(
                f"{path!r} was given {len(rows)} different inputs, too few for a basis of rank {rank}: take a larger "
                "batch, or a smaller rank"
            )
        vectors[path] = (rows[:wanted] / norms[:wanted]).float()
    if not vectors:
        raise ConfigError("none of the requested layers was called")
    layers_of = {path: chosen[path] for path in vectors}
    biased = all(layer.bias is not None for layer in layers_of.values())
    return Basis(vectors, {path: layer.out_features for path, layer in layers_of.items()}, biased)


def _layers(run: Run, globs: str | Collection[str] | None) -> dict[str, nn.Linear]:
    model = run.opened.model
    head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module is not head or globs is not None)
    }
    if globs is not None:
        names = select_names(run.plan.tree, globs, "layers")
        found = {name: module for name, module in found.items() if f"{name}.weight" in names}
    if not found:
        raise ConfigError("there is no linear layer to make a basis for" + (f" in {globs!r}" if globs else ""))
    return found


def _rows(x: Tensor, mask: Any) -> Tensor:
    """The inputs at tokens that are not padding, [tokens, in]."""
    if isinstance(mask, Tensor) and x.shape[: mask.ndim] == mask.shape:
        x = x[mask.bool()]
    x = x.detach().reshape(-1, x.shape[-1])
    return x[:: -(-len(x) // _MOST)].to("cpu", torch.float64)


def _reduced(rows: Tensor, count: int) -> Tensor:
    """The top `count` right singular vectors of `rows`, each times its singular value, largest first."""
    wide = rows.shape[0] < rows.shape[1]
    squares, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    vectors = vectors.flip(1)[:, :count]
    found = vectors.T @ rows if wide else vectors.T * squares.flip(0)[:count, None].clamp(min=0).sqrt()
    floor = 1e-6 * found.norm(dim=1).max()
    kept: Tensor = found * (found.norm(dim=1, keepdim=True) > floor)
    return kept
