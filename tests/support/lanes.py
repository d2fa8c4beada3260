"""A source of scratch weights from a dict, and what lanes must equal: the whole model perturbed at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from zo_offload.errors import PlanError
from zo_offload.kernels.records import STILL, Perturbation
from zo_offload.lanes.hub import Hub, Lane, PlanFault
from zo_offload.plan.blocks import Piece
from zo_offload.plan.plan import Owner, Plan, make_plan, relift

from .compare import assert_same
from .zoo.archs import ARCH, build

PLUS, MINUS = Perturbation(1, 2**-6), Perturbation(1, -(2**-6))
OTHER = Perturbation(2, 2**-6)


def perturbed(name: str, w: Tensor, perturbation: Perturbation) -> Tensor:
    """What any source must give for a parameter: a function of its name, values and the perturbation."""
    generator = torch.Generator().manual_seed(perturbation.seed * 1_000_003 + sum(name.encode()))
    return (w + perturbation.scale * torch.randn(w.shape, generator=generator)).to(w.dtype)


class DictSource:
    """Weights in a dict. Poisons scratch that is given back, so that using it later shows in the results.

    memory: "fresh" tensors each time; slices of one "arena", again and again, as a streamer may; or a "pool" of whole
    tensors that are used again.
    """

    def __init__(self, model: nn.Module, memory: str = "fresh") -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        self.out = 0
        self.emits: list[tuple[str, list[Perturbation], Tensor | None]] = []
        self._arena = torch.zeros(20 * sum(w.numel() for w in self.weights.values())) if memory == "arena" else None
        self._pool: dict[torch.Size, list[Tensor]] | None = {} if memory == "pool" else None
        self._taken: dict[int, tuple[int, int]] = {}  # id of scratch handed out -> its place in the arena
        self._cache: dict[Any, Tensor] = {}

    def perturbed(self, name: str, perturbation: Perturbation) -> Tensor:
        perturbation = STILL if name in self.frozen else perturbation
        key = (name, perturbation)
        if key not in self._cache:
            with torch.inference_mode(False), torch.no_grad():
                self._cache[key] = perturbed(name, self.weights[name], perturbation)
        return self._cache[key]

    def emit(
        self,
        owner: Owner,
        perturbations: Sequence[Perturbation],
        rows: Tensor | None = None,
        pieces: Sequence[Piece] | None = None,
        *,
        fresh: bool = False,
    ) -> list[list[Tensor]]:
        self.emits.append((owner.name, list(perturbations), rows))
        self.out += 1
        parts = dict[str, slice]()  # of each parameter the elements asked for: what its pieces make up
        for piece in pieces or ():
            start = parts[piece.name].start if piece.name in parts else piece.start
            assert piece.name not in parts or parts[piece.name].stop == piece.start, "in order, and without a gap"
            parts[piece.name] = slice(start, piece.stop)
        names = [name for name in owner.params if pieces is None or name in parts]
        size = len(perturbations) * sum(self.weights[n].numel() for n in names)
        used = start = self._place(size)
        scratch: list[list[Tensor]] = []
        for p in perturbations:
            scratch.append([])
            for name in names:
                w = self.perturbed(name, p)
                if rows is not None:
                    w = w[rows]
                elif pieces is not None:
                    w = w.view(-1)[parts[name]].view(-1, *w.shape[1:])
                if self._pool is not None:
                    free = self._pool.setdefault(w.shape, [])
                    scratch[-1].append((free.pop() if free else torch.empty_like(w)).copy_(w))
                elif self._arena is None:
                    scratch[-1].append(w.clone())
                else:
                    scratch[-1].append(self._arena[used : used + w.numel()].view(w.shape).copy_(w))
                    used += w.numel()
        self._taken[id(scratch)] = (start, start + size)
        return scratch

    def _place(self, size: int) -> int:
        """The lowest place in the arena that is free."""
        start = 0
        for low, high in sorted(self._taken.values()):
            if start + size <= low:
                break
            start = high
        return start

    def release(self, scratch: list[list[Tensor]]) -> None:
        self.out -= 1
        del self._taken[id(scratch)]
        with torch.inference_mode():  # the lane's modes may be any
            for t in tree_leaves(scratch):
                t.fill_(float("nan"))
                if self._pool is not None:
                    self._pool[t.shape].append(t)


def whole_model(
    model: nn.Module, source: DictSource, lane: Lane, call: Callable[..., Any] | None = None, *, functional: bool = True
) -> Any:
    """The forward of one lane with all parameters perturbed at once."""
    call = call or (lambda m, b: m(**b))
    named = dict(model.named_parameters())
    weights = {n: source.perturbed(n, lane.perturbation) for n in named}
    if functional and call.__name__ == "<lambda>":
        # as Parameters: matmul takes another path for weights that do not require grad
        params = {n: nn.Parameter(w, requires_grad=named[n].requires_grad) for n, w in weights.items()}
        with torch.no_grad():
            return functional_call(model, params, (), dict(lane.batch))
    before = {n: p.data for n, p in named.items()}
    for n, p in named.items():
        p.data = weights[n]
    try:
        with torch.no_grad():
            return call(model, lane.batch)
    finally:
        for n, p in named.items():
            p.data = before[n]


def experts_in_runs(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Give the plain model's cut experts a forward that takes a run at a time, written plainly; which they are.

    The caller deletes it again. A run ends where no parameter has a piece with rows of the experts on both sides.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    patched = []
    for module in model.modules():
        if not hasattr(module, "down_proj") or not isinstance(module.down_proj, nn.Parameter):
            continue
        edges = [
            e for e in range(module.num_experts + 1)
            if all(
                e * p[0].numel() in (0, p.numel(), *(piece.start for piece in plan.pieces_of(names[id(p)])))
                for p in module.parameters()
            )
        ]  # fmt: skip
        if len(edges) > 2:
            runs = [range(a, b) for a, b in pairwise(edges)]
            module.forward = _forward_in_runs(module, runs)  # type: ignore[method-assign]
            patched.append(module)
    return patched


def _forward_in_runs(module: Any, runs: Sequence[range]) -> Callable[..., Tensor]:
    own, num_experts = type(module).forward, module.num_experts

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        whole = dict(module._parameters)
        total, dtype = torch.zeros(x.shape, dtype=torch.float32), x.dtype
        for run in runs:
            chosen = [torch.where(index.t() == expert) for expert in run]
            choice, token = (torch.cat(parts) for parts in zip(*chosen, strict=True))
            if not len(token):
                continue
            numbers = torch.cat([torch.full_like(t, i) for i, (_, t) in enumerate(chosen)])
            try:
                module.num_experts = len(run)
                for name, w in whole.items():
                    module._parameters[name] = nn.Parameter(w[run.start : run.stop], requires_grad=False)
                rows = own(module, x[token], numbers[:, None], weights[token, choice][:, None])
            finally:
                module.num_experts = num_experts
                module._parameters.update(whole)
            dtype = rows.dtype
            for _, tokens in chosen:
                total.index_add_(0, tokens, rows[: len(tokens)].float())
                rows = rows[len(tokens) :]
        return total.to(dtype)

    return forward


@contextlib.contextmanager
def tiled_model(model: nn.Module, plan: Plan) -> Iterator[int]:
    """The plain model with torch's products of the pieces in its cut linear layers, and its experts in runs.

    Gives how many modules that are.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    patched = experts_in_runs(model, plan)
    for module in model.modules():
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue
        if len(plan.pieces_of(names[id(module.weight)])) == 1:
            continue
        cuts = [
            slice(piece.start // module.in_features, piece.stop // module.in_features)
            for piece in plan.pieces_of(names[id(module.weight)])
        ]

        def forward(x: Tensor, module: Any = module, cuts: Any = cuts) -> Tensor:
            w, b = module.weight, module.bias
            return torch.cat([F.linear(x, w[rows], None if b is None else b[rows]) for rows in cuts], dim=-1)

        module.forward = forward  # type: ignore[method-assign, assignment]
        patched.append(module)
    try:
        yield len(patched)
    finally:
        for module in patched:
            del module.forward


def has_forward(model: nn.Module) -> list[str]:
    """Modules with a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def assert_lanes_give(
    model: nn.Module, plan: Plan, source: DictSource, lanes: Sequence[Lane], want: Sequence[Any], what: str
) -> None:
    """In every order of service the lanes give `want` bit for bit, and the model is as before afterwards."""
    for order in ("module", "block", "lane"):
        with Hub(model, plan, source, order=order) as hub:  # type: ignore[arg-type]
            for some in (lanes[:2], lanes, lanes):  # watched, not watched, and with a plan learnt from the first run
                for i, (got, wanted) in enumerate(zip(run_settled(hub, some), want, strict=False)):
                    assert_same(got, wanted, f"{what} order={order} lane {i}")
                if not hub.plan.traced:
                    assert hub.trace is not None
                    hub.adopt(relift(hub.plan, hub.trace))
            assert source.out == 0
        assert has_forward(model) == []
    for name, p in model.named_parameters():
        assert torch.equal(p, source.weights[name]), f"{name} is not as before"


def plan_of(name: str, **options: Any) -> Plan:
    """The plan of an architecture."""
    return make_plan(build(ARCH[name]), ARCH[name].batch(0), **options)


def owners_of(plan: Plan) -> dict[str, set[str]]:
    return {owner.name: set(owner.params) for owner in plan.owners}


def run_settled(
    hub: Hub,
    lanes: Sequence[Lane],
    call: Callable[[nn.Module, Any], Any] | None = None,
    *,
    attempts: int = 8,
) -> list[Any]:
    """`hub.run`, relifting the plan after each fault, as an engine does."""
    for _ in range(attempts):
        try:
            return hub.run(lanes, call)
        except PlanFault as fault:
            last = fault
            hub.adopt(relift(hub.plan, fault.trace))
    raise PlanError(f"the plan still has faults after {attempts} corrections; the last: {last}")
