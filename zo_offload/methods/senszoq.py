"""SensZOQ: MeZO on a fixed list of weights, the most sensitive ones, from a file.

    m_i = 1 for the weights of the list, else 0, the same in every step
    grad = (L(w + eps m z) - L(w - eps m z)) / (2 eps)          w <- w - lr grad m z

The file is in safetensors format: by parameter, the flattened indices of its listed elements, int64 or int32 and
rising, or a mask of its shape, bool or uint8. A parameter that is not in the file has no listed elements: leave it out
by `trainable`, else it is written back unchanged. The run's lists are stored in its directory (`masks.safetensors`),
their digests in the journal, so the file may be deleted. Unlisted weights are not decayed either.
`examples/sensitive_weights.py` makes a file: the weights with the largest squared gradients of the loss on some text,
which is the paper's measure.

Source: Guo et al. 2024, "Zeroth-Order Fine-Tuning of LLMs with Extreme Sparsity", arXiv 2406.02913 (ICLR 2025 as
"Zeroth-Order Fine-Tuning of LLMs with Transferable Static Sparsity"): a thousandth of the weights, found once on text
like that of pretraining. The paper stores all others in four bits; here a parameter has one format, and parameters that
train are stored in 16 or 32 bits, or in int8+8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ConfigError
from ..kernels.records import Mask, Smallest
from .mezo import MeZO


@dataclass(frozen=True, kw_only=True)
class SensZOQ(MeZO, name="senszoq"):
    """MeZO on the weights that a file lists."""

    mask_file: str = ""
    """A safetensors file: by parameter, indices of the elements that train, or a mask of its shape."""

    def mask(self, run_seed: int, name: str, shape: torch.Size) -> Mask | Smallest | None:
        if not self.mask_file:
            raise ConfigError(
                f"method {self.name!r} trains the weights that a file lists: give mask_file (--mask-file)"
            )
        found = torch.zeros(0, dtype=torch.int64, device="cpu")
        try:
            with safe_open(self.mask_file, framework="pt") as file:
                names = file.keys()
                found = file.get_tensor(name) if name in names else found
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"mask_file={self.mask_file}: no safetensors file that can be read: {error}") from None
        if found.dtype in (torch.bool, torch.uint8):
            if found.shape != shape:
                raise ConfigError(
                    f"mask_file={self.mask_file}: the mask of {name!r} has shape {tuple(found.shape)}, the parameter "
                    f"{tuple(shape)}"
                )
            found = found.flatten().nonzero().flatten()
        try:
            return Mask.listed(found, shape.numel())
        except ConfigError as error:
            raise ConfigError(f"mask_file={self.mask_file}: {name!r}: {error}") from None
