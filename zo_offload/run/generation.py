"""Text generation with streamed weights: one pass per token, for all rows of a batch together.

`transformers`' own `generate` runs in one lane; each of its calls of the model is one pass, whose first blocks are
fetched while the previous pass ends. So a token costs as much as a forward: from disk, the time to read the model. Rows
share a pass, so many prompts at once cost little more than one.

The result is that of transformers: ids for ids; for texts, the text that follows each prompt, or for an encoder-decoder
the decoder's whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..data.texts import check_unicode, end_of_text, open_ids, text_ids
from ..errors import ConfigError
from ..modules.kind import kind_of, unwrapped
from ..modules.positions import learned_positions

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation: dicts with "role" and "content"."""


def check_generates(model: nn.Module) -> None:
    """Raise ConfigError for a model that has no `generate`."""
    inner: Any = unwrapped(model)
    can = inner.can_generate() if hasattr(inner, "can_generate") else True
    if not can or not callable(getattr(model, "generate", None)):
        raise ConfigError(
            f"{type(inner).__name__} cannot generate: it has no generate(). Open the checkpoint as a class that has, "
            "model_class=... (--model-class); for this model's outputs, use engine.run(batch)"
        )


def generate_texts(
    model: nn.Module, tokenizer: Any, prompts: Any, generate: Callable[..., Any], **options: Any
) -> str | list[str]:
    """The text that the model generates for each prompt. options: those of transformers' `generate`.

    generate(inputs, **options): gives token ids, as the model's own `generate` does for a batch of tensors. prompts: a
    text or a conversation, or a list of them. One prompt gives one text, or a list of num_return_sequences texts; a
    list gives a list, in which the texts of one prompt are next to each other. Raises ConfigError without a tokenizer,
    for a prompt without tokens, and if the model has too few positions.
    """
    if tokenizer is None:
        raise ConfigError("generating text needs a tokenizer: Engine(..., tokenizer=...)")
    single = isinstance(prompts, str) or _is_conversation(prompts)
    answers = kind_of(model).name == "seq2seq"
    rows = [prompt_ids(tokenizer, prompt, closed=answers) for prompt in _listed([prompts] if single else prompts)]
    texts = texts_after(model, tokenizer, rows, generate, **options)
    return texts[0] if single and len(texts) == 1 else texts


def texts_after(
    model: nn.Module, tokenizer: Any, rows: Sequence[list[int]], generate: Callable[..., Any], **options: Any
) -> list[str]:
    """The text that the model generates after each row of token ids; see `generate_texts`."""
    answers = kind_of(model).name == "seq2seq"
    empty = [i for i, row in enumerate(rows) if not row]
    if empty or not rows:
        raise ConfigError(f"prompt {empty[0]} has no tokens" if empty else "no prompt was given")
    width = max(len(row) for row in rows)
    if not answers:
        _check_positions(model, width, options)
    pad = _pad_token(tokenizer, model)
    # a decoder appends on the right, so padding goes on the left, whatever the tokenizer does in training
    filled = [_filled(row, width, pad, left=not answers) for row in rows]
    ids, mask = (torch.tensor([pair[i] for pair in filled], device="cpu") for i in (0, 1))
    if options.get("stop_strings") is not None:
        options = {"tokenizer": tokenizer, **options}
    out = generate({"input_ids": ids, "attention_mask": mask}, **{"pad_token_id": pad, **options})
    said = (out if isinstance(out, torch.Tensor) else out.sequences)[:, 0 if answers else width :]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in said]


def prompt_ids(tokenizer: Any, prompt: Prompt, *, closed: bool) -> list[int]:
    """A prompt's tokens. closed: with the end-of-text token, if the tokenizer puts one after a text.

    An encoder reads a closed text; a text that a decoder continues must be open. A conversation goes through the
    tokenizer's chat template. A text that begins with the BOS token itself does not get a second one.
    """
    if not isinstance(prompt, str):
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the prompt is a conversation, and the tokenizer has no chat template: give it one "
                "(tokenizer.chat_template = ...), or write the prompt as one text"
            )
        made = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(made)
    return text_ids(tokenizer, prompt) if closed else open_ids(tokenizer, prompt)


def _is_conversation(prompts: Any) -> bool:
    return isinstance(prompts, (list, tuple)) and bool(prompts) and all(isinstance(m, Mapping) for m in prompts)


def _listed(prompts: Any) -> list[Prompt]:
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts  # a column of a table, an array
    listed = list(prompts) if isinstance(prompts, Sequence) else [prompts]
    for i, prompt in enumerate(listed):
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise ConfigError(
                f"prompt {i} is a {type(prompt).__name__}: expected a text, a list of messages (dicts with role and "
                "content), or for token ids one dict with input_ids of all rows"
            )
        if isinstance(prompt, str):
            check_unicode(prompt, f"prompt {i}")
    return listed


def _filled(row: list[int], width: int, pad: int, *, left: bool) -> tuple[list[int], list[int]]:
    """(ids, mask) of a row in a table of `width`."""
    missing = width - len(row)
    ids, mask = [pad] * missing, [0] * missing
    return (ids + row, mask + [1] * len(row)) if left else (row + ids, [1] * len(row) + mask)


def _pad_token(tokenizer: Any, model: nn.Module) -> int:
    """The tokenizer's padding token, else the model's, else an end-of-text token."""
    config = getattr(model, "generation_config", None)
    own = getattr(tokenizer, "pad_token_id", None)
    for found in (own, *(getattr(config, f"{name}_token_id", None) for name in ("pad", "eos"))):
        if isinstance(found := found[0] if isinstance(found, list) and found else found, int):
            return found
    end = end_of_text(tokenizer)
    return end if isinstance(end, int) else 0


def _check_positions(model: nn.Module, width: int, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if the text is longer than the model's learned table of positions."""
    limit, new = learned_positions(model), options.get("max_new_tokens")
    if limit is None or (asked := width + (new if isinstance(new, int) else 0)) <= limit:
        return
    raise ConfigError(
        f"the longest prompt has {width} tokens and {asked - width} new ones are requested, but the model has {limit} "
        f"positions. Shorten the prompt, or lower max_new_tokens{f' to {limit - width}' if width < limit else ''}"
    )
