"""compute="auto": the faster dtype of forwards on this CPU, float32 or bfloat16, measured before a run begins.

CPUs with units for 16-bit products (AMX, AVX512-BF16, SVE-BF16) multiply bfloat16 two to four times as fast as float32;
the others emulate it, many times slower, and no CPU flag tells the speed of its libraries. So a small transformer layer
is computed in both, with the tokens of a short and of a long batch, on the run's threads. bfloat16 is chosen if it is
clearly faster in both cases. The choice changes a run's numbers: it is made once, when the run begins, and recorded.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import DTYPES, EngineConfig
from ..devices.base import PlannedDevice
from ..errors import ConfigError
from ..ranks.alone import Alone

CLEARLY = 1.25
"""The least speed-up for which bfloat16 is chosen: measurements of milliseconds scatter by a tenth, and some parts of a
forward gain nothing."""
TOKENS = (32, 256)
_WIDTH = 512
_HEADS = 8


def decide_compute(
    config: EngineConfig, device: PlannedDevice, own: torch.dtype, ranks: Alone
) -> tuple[EngineConfig, tuple[str, ...]]:
    """(settings with the choice for compute="auto", a line with the reason), for a checkpoint stored in `own`; the
    unchanged settings and no line, if a dtype was given. Ranks use rank 0's measurement: all must compute alike."""
    measures = config.compute == "auto" and config.device == "cpu"
    asked, found = ranks.first(
        "opening", lambda: (config.compute, bf16_gains(torch.get_num_threads()) if measures else {})
    )
    if (asked == "auto") != (config.compute == "auto"):
        raise ConfigError(f"compute={config.compute!r} here and {asked!r} on rank 0: all ranks compute alike")
    if config.compute != "auto":
        return config, ()
    if config.device != "cpu":
        own = device.default_compute(own)
        return replace(config, compute=None), (f"compute auto takes {own}: the checkpoint's own, as always on a GPU",)
    chosen = "bf16" if min(found.values()) >= CLEARLY else "fp32"
    told = " and ".join(f"{gain:.1f} times as fast at {tokens} tokens" for tokens, gain in found.items())
    return replace(config, compute=chosen), (f"compute auto takes {chosen}: a layer in bf16 is {told} as in fp32 here",)


def check_module(config: EngineConfig, module: nn.Module) -> None:
    """Raise ConfigError if a module in memory is not in the given dtype: it is computed in its own."""
    if config.compute in (None, "tf32"):
        return
    own = {p.dtype for p in module.parameters() if p.is_floating_point()}
    wanted = DTYPES.get(config.compute, torch.bfloat16)
    if config.compute == "auto" or own != {wanted}:
        has = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in own)) or "none"
        raise ConfigError(
            f"compute={config.compute!r} is for a checkpoint's directory. A module in memory is computed in the dtypes "
            f"of its parameters, here {has}: give the engine module.to({wanted}), and storage= for the format they are "
            "kept in"
        )


@functools.cache
def bf16_gains(threads: int) -> dict[str, float]:
    """The speed of a layer in bfloat16 relative to float32, by tokens; takes about a tenth of a second, once."""
    assert threads == torch.get_num_threads(), "measured on the threads that compute"
    return {str(tokens): round(_gain(tokens), 2) for tokens in TOKENS}


def _gain(tokens: int) -> float:
    layers = {dtype: _layer(tokens, dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(layers, float("inf"))
    with torch.no_grad():
        for _ in range(4):  # in turns, and the first of each warms up
            for dtype, layer in layers.items():
                start = time.perf_counter()
                layer()
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def _layer(tokens: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The forward of a transformer layer on zeros of `dtype`: norm, attention, norm, MLP."""
    x_TD = torch.zeros(tokens, _WIDTH, dtype=dtype, device="cpu")
    qkv, out, up, down = (
        torch.zeros(rows, columns, dtype=dtype, device="cpu")
        for rows, columns in ((3 * _WIDTH, _WIDTH), (_WIDTH, _WIDTH), (4 * _WIDTH, _WIDTH), (_WIDTH, 4 * _WIDTH))
    )

    def forward() -> Tensor:
        q_HTE, k_HTE, v_HTE = (
            F.linear(F.layer_norm(x_TD, (_WIDTH,)), qkv).view(tokens, 3, _HEADS, -1).permute(1, 2, 0, 3)
        )
        mixed_TD = F.scaled_dot_product_attention(q_HTE, k_HTE, v_HTE).transpose(0, 1).reshape(tokens, _WIDTH)
        h_TD = x_TD + F.linear(mixed_TD, out)
        return h_TD + F.linear(F.gelu(F.linear(F.layer_norm(h_TD, (_WIDTH,)), up)), down)

    return forward
