"""The number of tokens that a model can take, from its own modules: the rows of its position tables minus their offset.

A learned table limits positions by its rows. In BART, OPT and similar models it begins at `offset`, in RoBERTa and
similar models after the row of the padding token; both are attributes of the table. A model without a table is limited
by its config, unless positions are relative (T5, DeBERTa-v3, ALiBi) and therefore unlimited.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_TABLE = re.compile(r"(embed_)?(wpe|pos(ition)?(s|al)?)(_(emb|embed|embeds|embedding|embeddings|encoding))?(_layer)?")
_RELATIVE = re.compile(r"relative|(^|[._])rel_|alibi")
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def position_limits(model: nn.Module) -> tuple[int | None, int | None]:
    """(tokens of the encoder or of a model without one, tokens of the decoder); None if unlimited."""
    tables = list(_tables(model))
    decoders = [limit for name, limit in tables if "decoder" in name.split(".")]
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        limit = min((limit for _, limit in tables), default=None)
        return (limit if limit is not None else _said(model, config)), None
    encoders = [limit for name, limit in tables if "decoder" not in name.split(".")]
    said = None if tables else _said(model, config)
    return min(encoders, default=said), min(decoders, default=said)


def virtual_tokens(model: nn.Module) -> int:
    """Tokens that a peft model puts before each row (prompt, prefix and p-tuning)."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None or not getattr(adapter, "is_prompt_learning", False):
        return 0
    return int(adapter.num_virtual_tokens)


def _tables(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(path, usable rows) of each table of token positions; a table next to a convolution is for patches or sound."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Linear) or not _TABLE.fullmatch(name):
            continue
        if any(isinstance(child, _CONV) for child in modules[parent].children()):
            continue
        offset, padding = getattr(module, "offset", None), getattr(module, "padding_idx", None)
        start = offset if isinstance(offset, int) else padding + 1 if isinstance(padding, int) else 0
        yield path, len(weight) - start


def _said(model: nn.Module, config: Any) -> int | None:
    """The config's limit, unless positions are relative."""
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = (name for name, _ in model.named_modules())
    if getattr(text, "alibi", False) or any(_RELATIVE.search(name) for name in names):
        return None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(limit := getattr(text, name, None), int) and limit > 0:
            return limit
    return None


def learned_positions(model: nn.Module) -> int | None:
    """Number of learned positions of a decoder, minus peft's virtual tokens; None if positions are not learned."""
    limit = min((limit for _, limit in _tables(model)), default=None)
    return None if limit is None else limit - virtual_tokens(model)
