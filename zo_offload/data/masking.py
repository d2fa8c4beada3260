"""Random masks for plain text, as masked language models are trained; a resumed run repeats them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ..modules.kind import IGNORED, ModelKind
from .prompts import mask_token

MASKED, REPLACED, KEPT = (
    0.15,
    0.1,
    0.1,
)  # share of tokens; shares of the hidden ones: by a random token, by itself (BERT, section 3.1)


class RandomMasks:
    """Hides 15 % of a row's tokens for prediction: 80 % of them become masks, 10 % other tokens, 10 % stay.

    At least one token of a row is predicted. The choice is a function of the row's tokens and `draw` alone.
    """

    def __init__(self, kind: ModelKind, tokenizer: Any):
        mask_token(tokenizer, kind)
        self._mask, self._special = tokenizer.mask_token_id, frozenset(tokenizer.all_special_ids)
        self._tokens = min(len(tokenizer), kind.vocabulary or len(tokenizer))

    def __call__(self, ids: list[int], draw: str) -> tuple[list[int], list[int]]:
        """(ids with masks, labels). A row that has only special tokens has no labels."""
        key = hashlib.blake2b(f"masks {draw} {ids}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        free = [i for i, token in enumerate(ids) if token not in self._special]
        asked, how = torch.rand(2, len(free), generator=generator, device="cpu").tolist() if free else ([], [])
        others = torch.randint(self._tokens, (len(free),), generator=generator, device="cpu").tolist()
        least = min(asked, default=0.0)
        given, labels = list(ids), [IGNORED] * len(ids)
        for place, chance, way, other in zip(free, asked, how, others, strict=True):
            if chance < MASKED or chance == least:
                labels[place] = ids[place]
                given[place] = self._mask if way >= REPLACED + KEPT else other if way < REPLACED else ids[place]
        return given, labels
