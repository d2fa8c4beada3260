"""Finds each parameter's owners: the modules that get it while they run.

By default the owner is the module that holds the parameter. A parameter used elsewhere is *lifted* to the nearest
running module whose calls cover its uses; the same parameter of all other modules of that module's class is lifted too,
because they may do the same on other data. If the trace fails, parameters of repeated layers are lifted to their layer
until a real run shows their uses.
"""

from __future__ import annotations

from ..errors import PlanError
from ..modules.recorder import Path, Trace
from ..modules.tree import ModuleTree, upwards


def serve(tree: ModuleTree, trace: Trace) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """(canonical name -> modules that are served the parameter, notes on lifts)."""
    above = _running_above(tree, trace)
    serving = {n: _cover(n, trace.uses.get(n, frozenset()), tree, trace) for n in tree.holders}
    for name, owners in list(serving.items()):
        for owner in owners - set(tree.holders[name]):
            for sibling in _siblings(name, owner, tree):
                serving[sibling[0]].add(sibling[1])
    result = {}
    for name, owners in serving.items():  # a module inside another that has the parameter needs no serving
        outer = {o for o in owners if not (above[o] & owners - {o})}
        result[name] = tuple(o for o in tree.classes if o in outer)
    return result, trace.notes


def _cover(name: str, uses: frozenset[Path], tree: ModuleTree, trace: Trace) -> set[str]:
    """Modules whose calls together cover the uses: a holder if it was running, else the innermost running module.

    For a weight that is changed in place it is one module around all uses, so that all of them see the change.
    """
    holders = {tree.runner(h) for h in tree.holders[name]}
    if () in uses:
        raise PlanError(
            f"parameter {name!r} is used outside of any module's call (by the code that calls the model). Weights "
            f"exist only while modules run: put that computation into a module's forward."
        )
    cover = {next((m for m in reversed(path) if m in holders), path[-1]) for path in uses}
    if name in trace.writes:
        cover = {[outer for outer, *others in zip(*uses, strict=False) if {outer}.issuperset(others)][-1]}
    if not trace.complete:  # an unseen use may be anywhere within the layer
        cover |= {tree.element_of(h) or h for h in holders}
    return cover or set(holders)


def _siblings(name: str, owner: str, tree: ModuleTree) -> list[tuple[str, str]]:
    """(parameter, module) for every module of the owner's class, with the parameter at the same place below it."""
    prefix = f"{owner}." if owner else ""
    places = [a[len(prefix) :] for a, c in tree.names.items() if c == name and a.startswith(prefix)]
    peers = [m for m, cls in tree.classes.items() if cls == tree.classes[owner]] if owner else [""]
    found = []
    for peer in peers:
        for place in places:
            canonical = tree.names.get(f"{peer}.{place}" if peer else place)
            if canonical is not None:
                found.append((canonical, peer))
    return found


def _running_above(tree: ModuleTree, trace: Trace) -> dict[str, frozenset[str]]:
    """Module -> modules that are running whenever it is called; by its path if it was not seen to run."""
    above: dict[str, frozenset[str]] = {}
    stack: list[str] = []
    for depth, name in trace.order:
        del stack[depth:]
        outer = frozenset(stack)
        above[name] = above[name] & outer if name in above else outer
        stack.append(name)
    for name in tree.classes:
        if name not in above:
            above[name] = frozenset(m for m in upwards(name)[1:] if m not in tree.containers)
    return above
