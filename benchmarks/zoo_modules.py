"""Plain modules that do what modules may do and a window of weights may get wrong, each a sample of a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

D = 16


def vectors() -> dict[str, Any]:
    return {"x": torch.randn(2, 8, D, generator=torch.Generator().manual_seed(1))}


def images() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def tokens() -> dict[str, Any]:
    return {"x": torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class Odd:
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]] = vectors


class Base(nn.Module):
    """Two layers around `middle`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.make()

    def make(self) -> None: ...

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.tanh(self.first(x))))


class LayerCounter(Base):
    """Counts its layers in a number that each forward sets to zero."""

    def make(self) -> None:
        self.layers, self.i = nn.ModuleList(nn.Linear(D, D) for _ in range(4)), 0

    def middle(self, x: Tensor) -> Tensor:
        self.i = 0
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * 0.5**self.i
            self.i += 1
        return x


class PythonSum(Base):
    """Adds up Python floats in an attribute."""

    def make(self) -> None:
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.total: Any = 0.0

    def middle(self, x: Tensor) -> Tensor:
        self.total = 0.0
        for layer in self.layers:
            y = layer(x)
            self.total += y.square().mean().item()
            x = x + torch.tanh(y)
        return x * (1 + self.total)


class TensorSum(PythonSum):
    """The same with tensors."""

    def middle(self, x: Tensor) -> Tensor:
        self.total = torch.zeros(())
        for layer in self.layers:
            y = layer(x)
            self.total = self.total + y.square().mean()
            x = x + torch.tanh(y)
        return x * (1 + self.total)


class Carried(Base):
    """A recurrent state in an attribute, from one call to the next."""

    def make(self) -> None:
        self.cell, self.h = nn.GRUCell(D, D), None

    def middle(self, x: Tensor) -> Tensor:
        for t in range(x.shape[1]):
            h = x.new_zeros(x.shape[0], D) if self.h is None else self.h
            self.h = self.cell(x[:, t], h)
        return x + self.h[:, None]


class StepCounter(Base):
    """Counts its calls and computes with the count."""

    def make(self) -> None:
        self.calls = 0

    def middle(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x / self.calls


class Toggles(Base):
    """A child is in train mode for one call."""

    def make(self) -> None:
        self.norm, self.inner = nn.BatchNorm1d(D), nn.Linear(D, D)

    def middle(self, x: Tensor) -> Tensor:
        self.norm.train()
        y = self.inner(self.norm(x.transpose(1, 2)).transpose(1, 2))
        self.norm.eval()
        return y + self.norm(x.transpose(1, 2)).transpose(1, 2)


class WeightOutside(Base):
    """A weight found by name and used outside of its module, before a norm with buffers."""

    def make(self) -> None:
        self.aside, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

    def middle(self, x: Tensor) -> Tensor:
        w = next(p for n, p in self.named_parameters() if n == "aside.weight")
        return self.norm((x @ w).transpose(1, 2)).transpose(1, 2)


class CachedProduct(Base):
    """A table made of weights in the first call."""

    def make(self) -> None:
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.product: Tensor | None = None

    def middle(self, x: Tensor) -> Tensor:
        if self.product is None:
            self.product = self.a.weight.detach() @ self.b.weight.detach()
        return self.b(self.a(x)) @ self.product


class Vmapped(Base):
    def make(self) -> None:
        self.inner = nn.Sequential(nn.Linear(D, D), nn.Tanh())

    def middle(self, x: Tensor) -> Tensor:
        return torch.vmap(self.inner)(x)


class Jvp(Vmapped):
    def middle(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.inner, (x,), (torch.ones_like(x),))[1]


class Jacobian(Vmapped):
    def middle(self, x: Tensor) -> Tensor:
        return x @ torch.func.jacrev(lambda v: self.inner(torch.tanh(v)))(x[0, 0])


class Gradient(Vmapped):
    def middle(self, x: Tensor) -> Tensor:
        return x + torch.func.grad(lambda v: self.inner(v).square().sum())(x)


class FunctionalCall(Vmapped):
    def middle(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.inner, dict(self.inner.named_parameters()), (x,))


class Scripted(Base):
    def make(self) -> None:
        self.inner = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.ReLU()))

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Traced(Scripted):
    def make(self) -> None:
        self.inner = torch.jit.trace(nn.Linear(D, D), torch.randn(2, D))


class Compiled(Base):
    def make(self) -> None:
        self.inner = torch.compile(nn.Sequential(nn.Linear(D, D), nn.GELU()), backend="eager")

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(x)


class CompiledInPlace(Compiled):
    def make(self) -> None:
        self.inner = nn.Sequential(nn.Linear(D, D), nn.GELU())
        self.inner.compile(backend="eager")


class ScaledOnce(Base):
    """Divides a weight in its first forward, and remembers that it has."""

    def make(self) -> None:
        self.inner, self.scaled = nn.Linear(D, D), False

    def middle(self, x: Tensor) -> Tensor:
        if not self.scaled:
            with torch.no_grad():
                self.inner.weight.div_(2.5)
            self.scaled = True
        return self.inner(x)


class Clamped(Base):
    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.weight.clamp_(-0.1, 0.1)
        return x


class MaxNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, D, max_norm=1.0), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class OddParameters(Base):
    """Frozen parameters of kinds that cannot train."""

    def make(self) -> None:
        for name, value in dict(
            index=torch.randperm(D), mask=torch.rand(D) > 0.3, table=torch.randn(D, dtype=torch.float64),
            codes=torch.randint(0, 255, (D, D), dtype=torch.uint8), spectrum=torch.randn(9, dtype=torch.complex64),
        ).items():  # fmt: skip
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.gain, self.none = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.empty(0))

    def middle(self, x: Tensor) -> Tensor:
        x = x[..., self.index] * self.mask + self.table.float()
        return torch.fft.irfft(torch.fft.rfft(x) * self.spectrum, n=D) @ (self.codes.float() / 255) * self.gain


class Transposed(Base):
    def make(self) -> None:
        self.inner = nn.Linear(D, D)
        self.inner.weight = nn.Parameter(torch.randn(D, D).t())

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(x)


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x.to(memory_format=torch.channels_last))))


class ViewInAttribute(Base):
    def make(self) -> None:
        self.part = self.first.weight[:4].detach()

    def middle(self, x: Tensor) -> Tensor:
        return x @ self.part.t() @ self.part


class Lists(Base):
    def make(self) -> None:
        self.ws = nn.ParameterList(nn.Parameter(torch.randn(D, D) / 4) for _ in range(3))
        self.extra = nn.ParameterDict({"shift": nn.Parameter(torch.randn(D))})

    def middle(self, x: Tensor) -> Tensor:
        for w in self.ws:
            x = torch.tanh(x @ w + self.extra["shift"])
        return x


class Normed(Base):
    """Old and new weight norm, spectral and orthogonal parametrizations."""

    def make(self) -> None:
        self.layers = nn.Sequential(
            nn.utils.weight_norm(nn.Linear(D, D)), parametrizations.weight_norm(nn.Linear(D, D)),
            parametrizations.spectral_norm(nn.Linear(D, D)), parametrizations.orthogonal(nn.Linear(D, D)),
        )  # fmt: skip

    def middle(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Recurrent(Base):
    def make(self) -> None:
        self.lstm, self.gru = nn.LSTM(D, D, 2, batch_first=True), nn.GRU(D, D, batch_first=True, bidirectional=True)
        self.join = nn.Linear(2 * D, D)

    def middle(self, x: Tensor) -> Tensor:
        return self.join(self.gru(self.lstm(x)[0])[0])


class Attention(Base):
    def make(self) -> None:
        layer = nn.TransformerEncoderLayer(D, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def middle(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Shared(Base):
    """One module several times, a tied weight, a weight read by another module."""

    def make(self) -> None:
        self.inner = nn.Linear(D, D)
        self.again, self.tied = self.inner, nn.Linear(D, D)
        self.tied.weight = self.first.weight

    def middle(self, x: Tensor) -> Tensor:
        return F.linear(self.tied(self.again(self.inner(x))), self.inner.weight.t())


class SharedMemory(Base):
    """A tie made through `.data`. Perturbed once, as a tie is, so the plain loop has to know of it."""

    def make(self) -> None:
        self.inner = nn.Linear(D, D)
        self.inner.weight = self.first.weight

    def middle(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Checkpointed(Base):
    def make(self) -> None:
        self.inner = nn.Sequential(nn.Linear(D, D), nn.GELU())

    def middle(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


class Routed(Base):
    """Values choose the layers, and how many."""

    def make(self) -> None:
        self.gate, self.experts = nn.Linear(D, 4), nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def middle(self, x: Tensor) -> Tensor:
        for chosen in self.gate(x).mean((0, 1)).argsort().tolist():
            x = x + self.experts[chosen](x)
            if x.mean().item() > 0.3:
                break
        return x


class GradientInside(Base):
    def make(self) -> None:
        self.inner = nn.Linear(D, D)

    def middle(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.inner(x).square().sum(), x)
        return x.detach() + grad.detach()


class ReplacesParameter(Base):
    def middle(self, x: Tensor) -> Tensor:
        self.last.bias = nn.Parameter(self.last.bias.detach() + 1)
        return x


class Quantized(Base):
    """The buffers and codes of a quantized layer."""

    def make(self) -> None:
        self.codes = nn.Parameter(torch.randint(-127, 127, (D, D), dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.rand(D, 1) / 127)
        self.adapter = nn.Linear(D, D)

    def middle(self, x: Tensor) -> Tensor:
        return x @ (self.codes.float() * self.scale) + self.adapter(x)


class CompiledInForward(Vmapped):
    """Compiles a function in its forward."""

    def middle(self, x: Tensor) -> Tensor:
        return torch.compile(lambda v: self.inner(v) * 2, backend="eager")(x)


class NoWidth(Base):
    """Layers without inputs, without outputs, and a parameter without elements."""

    def make(self) -> None:
        self.none, self.narrow, self.wide = nn.Parameter(torch.empty(0, D)), nn.Linear(D, 0), nn.Linear(0, D)

    def middle(self, x: Tensor) -> Tensor:
        return x + self.wide(self.narrow(x)) + self.none.sum()


class OtherDataForAWhile(Base):
    """Gives a child's weights other data for one call, through `.data`: its own transposed, then another module's."""

    def make(self) -> None:
        self.inner, self.shadow = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)), nn.Linear(D, D)

    def middle(self, x: Tensor) -> Tensor:
        for made in (lambda w: w.t().contiguous(), lambda w: self.shadow.weight.data):
            weight = self.inner[0].weight
            own = weight.data
            weight.data = made(own)
            x = x + self.inner(x)
            weight.data = own
        return self.inner(x)


class OtherDataForGood(Base):
    """Gives a weight other data and leaves it there."""

    def middle(self, x: Tensor) -> Tensor:
        self.first.weight.data = torch.ones(D, D)
        return x


MODULES: dict[str, Odd] = {
    f"module/{cls.__name__}": Odd(cls, {MaxNorm: tokens, ChannelsLast: images}.get(cls, vectors))
    for cls in (
        LayerCounter, PythonSum, TensorSum, Carried, StepCounter, Toggles, WeightOutside, CachedProduct, Vmapped, Jvp,
        Jacobian, Gradient, FunctionalCall, Scripted, Traced, Compiled, CompiledInPlace, ScaledOnce, Clamped, MaxNorm,
        OddParameters, Transposed, ChannelsLast, ViewInAttribute, Lists, Normed, Recurrent, Attention, Shared,
        SharedMemory, Checkpointed, Routed, GradientInside, ReplacesParameter, Quantized,
        CompiledInForward, NoWidth, OtherDataForAWhile, OtherDataForGood,
    )
}  # fmt: skip
