"""Text from a model whose weights stream: one pass a token, all rows of a batch together.

`transformers`' own `generate` runs, in one lane; each call of the model in it is a pass of its own, whose first blocks
are fetched while the last one ends. So a token costs what a forward costs: from disk, the time to read the model. Rows
share it, so many prompts at once cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .errors import ConfigError

if TYPE_CHECKING:
    from .engine import Engine


def generate_texts(engine: Engine, tokenizer: Any, prompts: Sequence[str], **options: Any) -> list[str]:
    """What follows each prompt, at the engine's current weights. options: of transformers' `generate`.

    Raises ConfigError without a tokenizer, or for a prompt of no tokens.
    """
    if tokenizer is None:
        raise ConfigError("to generate text there must be a tokenizer: Engine(..., tokenizer=...)")
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    empty = [i for i, row in enumerate(rows) if not row]
    if empty or not rows:
        raise ConfigError(f"prompt {empty[0]} has no tokens" if empty else "no prompt was given")
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    width = max(len(row) for row in rows)
    # at the left, whatever the tokenizer does for training: what is generated goes on at the right
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = engine.generate({"input_ids": ids, "attention_mask": mask}, **{"pad_token_id": pad, **options})
    return [str(tokenizer.decode(row[width:], skip_special_tokens=True)) for row in out]
