"""A tokenizer as values of a GGUF file: copied from another GGUF file, or made of a fast tokenizer of transformers.

Two kinds have a place there: BPE on bytes, as GPT-2's, if llama.cpp has a name for the way it splits a text; and BPE on
pieces with single bytes for what no piece covers, as Llama 2's, if its order of merges is an order of pieces (which
SentencePiece's is). Others are an error that names what has no place.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import tokenizers

_log = logging.getLogger(__name__)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}
"""Patterns of texts' parts, and their names in llama.cpp."""
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_PROBES = (
    "The quick brown fox, it's said, jumps over 13 lazy dogs.", "  two spaces\tand a tab\n\nnew  lines\r\n",
    "x = [i**2]", "naïve café 北京 12345 ½", "don't WE'LL I'm", "🙂 emoji", "", " ",
)  # fmt: skip


def copy(writer: Any, path: Path) -> None:
    """Add the tokenizer's values of another GGUF file, as they are."""
    import gguf

    for key, field in gguf.GGUFReader(path).fields.items():
        if key.startswith("tokenizer."):
            kind, is_array = field.types[0], field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if is_array else None)


def add(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Add the values of a tokenizer of transformers. CheckpointError: a kind that has no place in GGUF."""
    import gguf

    named = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"the tokenizer ({named}) has no tokenizer.json, from which GGUF's is written.")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"the tokenizer ({named}) is of type {model['type']}, and GGUF has a place for BPE.")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens, kinds = _tokens(parts, vocab_size, named)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges, named))
        writer.add_add_space_prefix(_adds_space(parts))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(parts, named))
        writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:
        tokenizers.save(tokenizer, Path(folder))
        special = gguf.SpecialVocab(folder, n_vocab=vocab_size)
        special.add_special_token |= _added(tokenizer)
        special.add_to_gguf(writer, quiet=True)
    if any(" " in piece for pair in merges for piece in pair):
        raise CheckpointError(f"the tokenizer ({named}) merges pieces with spaces, which GGUF separates merges by.")
    writer.add_token_merges([" ".join(pair) for pair in merges])


def _added(tokenizer: Any) -> dict[str, bool]:
    """Whether a tokenizer puts its first token before a text, and its last one after it; llama.cpp has defaults."""
    ids = tokenizer("a").input_ids
    first, last = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return {"bos": first is not None and ids[:1] == [first], "eos": last is not None and ids[-1:] == [last]}


def check(path: Path, tokenizer: Any) -> None:
    """Log it if transformers makes another tokenizer of a file that was written: llama.cpp knows more splits."""
    again = tokenizers.load_tokenizer(path)
    for text in (*_PROBES, *tokenizer.all_special_tokens):
        own, read = (t(text, add_special_tokens=False).input_ids for t in (tokenizer, again))
        if own != read:
            _log.warning(
                "transformers reads the tokenizer in %s otherwise: %r is %s there, and %s by %s. llama.cpp reads "
                "tokenizer.ggml.pre; for transformers, use the tokenizer's own files beside it",
                path.name, text, read, own, type(tokenizer).__name__,
            )  # fmt: skip
            return


def _tokens(parts: Mapping[str, Any], vocab_size: int, named: str) -> tuple[list[str], list[int]]:
    """All tokens by id, and their types."""
    known = {index: (text, _NORMAL) for text, index in parts["model"]["vocab"].items()}
    unknown = parts["model"].get("unk_token")
    for index, (text, _) in list(known.items()):
        is_byte = parts["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
        known[index] = text, _UNKNOWN if text == unknown else _BYTE if is_byte else _NORMAL
    for token in parts["added_tokens"]:
        if token["content"] != unknown:
            known[token["id"]] = token["content"], _CONTROL if token["special"] else _USER
    if known and max(known) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer ({named}) has the token {max(known)}, and the model an embedding of {vocab_size}."
        )
    rows = [known.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]], named: str) -> list[float]:
    """Scores by which llama.cpp merges in the tokenizer's order. CheckpointError: the merges are no order of pieces."""
    order = list(_runs("".join(pair) for pair in merges))
    if len(set(order)) < len(order):
        twice = next(piece for index, piece in enumerate(order) if piece in order[:index])
        raise CheckpointError(
            f"the tokenizer ({named}) merges {twice!r} at two places of its order, and GGUF has one score a piece."
        )
    rank = {piece: index for index, piece in enumerate(order)}
    return [-float(rank.get(token, 0 if len(token) > 1 else len(rank))) for token in tokens]


def _runs(pieces: Iterator[str]) -> Iterator[str]:
    last = None
    for piece in pieces:
        if piece != last:
            yield piece
        last = piece


def _adds_space(parts: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    told = json.dumps([parts.get("normalizer"), parts.get("pre_tokenizer")])
    return '"Prepend"' in told or '"prepend_scheme": "first"' in told or '"prepend_scheme": "always"' in told


def _split(parts: Mapping[str, Any], named: str) -> str:
    """llama.cpp's name of the way in which a byte-level BPE splits a text. CheckpointError: it has none."""
    pre = parts.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return "gpt-2"
        if len(steps) == 2 and steps[0].get("type") == "Digits" and steps[0].get("individual_digits"):
            return "smollm"
        if len(steps) == 2 and steps[0].get("type") == "Split" and not last.get("use_regex", True):
            pattern = steps[0].get("pattern", {}).get("Regex")
            if pattern in _SPLITS and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
                return _SPLITS[pattern]
    raise CheckpointError(
        f"the tokenizer ({named}) splits texts by {json.dumps(pre)[:160]}, which has no name in GGUF known here "
        f"({', '.join(['gpt-2', 'smollm', *_SPLITS.values()])})."
    )
