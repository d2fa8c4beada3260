"""The kind of a model: what it predicts, and so which inputs and labels it needs.

A model's class is looked up in transformers' own lists of classes by task, and in its config's `auto_map` if it brings
its own code; `is_encoder_decoder` and `is_decoder` decide if a class is in several lists. A module in no list has the
kind "other": nothing is assumed about it, and no labels are made for it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import nn

from ..hf import modeling_auto
from .positions import position_limits, virtual_tokens

Kind = Literal[
    "causal",  # each token is predicted from those before it
    "masked",  # what stands where the mask is
    "seq2seq",  # an encoder reads, a decoder answers
    "classification",  # a class, a number or several labels of a row
    "tokens",  # a class of each token
    "questions",  # where an answer begins and ends
    "choice",  # one of several inputs
    "bare",  # hidden states, no loss
    "other",
    "unknown",  # there is no model to ask
]

IGNORED = -100  # label of a position without a loss, as everywhere in transformers

# the first that names a class decides
_LISTS: list[tuple[Kind, tuple[str, ...]]] = [
    ("classification", ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION",
                        "VIDEO_CLASSIFICATION")),
    ("tokens", ("TOKEN_CLASSIFICATION",)),
    ("questions", ("QUESTION_ANSWERING",)),
    ("choice", ("MULTIPLE_CHOICE",)),
    ("seq2seq", ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")),
    ("masked", ("MASKED_LM",)),
    ("causal", ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")),
]  # fmt: skip
_BY_AUTO_CLASS: dict[str, Kind] = {
    "AutoModelForCausalLM": "causal", "AutoModelForMaskedLM": "masked", "AutoModelForSeq2SeqLM": "seq2seq",
    "AutoModelForSequenceClassification": "classification", "AutoModelForTokenClassification": "tokens",
    "AutoModelForQuestionAnswering": "questions", "AutoModelForMultipleChoice": "choice", "AutoModel": "bare",
}  # fmt: skip
_UNSHIFTED = frozenset((  # causal heads whose loss compares a label with the logits at its own place
    "BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM", "FlaubertWithLMHeadModel", "MBartForCausalLM", "MarianForCausalLM", "MusicgenForCausalLM",
    "MusicgenMelodyForCausalLM", "MvpForCausalLM", "PLBartForCausalLM", "PegasusForCausalLM", "ProphetNetForCausalLM",
    "TrOCRForCausalLM", "WhisperForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel",
))  # fmt: skip
_BY_ITS_CONFIG = ("seq2seq", "masked", "causal")  # kinds of a head on the vocabulary: which one, the config knows


@dataclass(frozen=True)
class ModelKind:
    """The kind of a model, and the sizes that its inputs and labels must fit."""

    name: Kind
    model: str
    """Its class, for messages."""
    shift: int = 0
    """1 if the logits at a position predict the next label, 0 if they predict the label at that position."""
    classes: int | None = None
    problem: str | None = None
    """transformers' problem type of a classification head; None: its labels decide."""
    class_ids: tuple[tuple[str, int], ...] = ()
    """The config's names of classes."""
    positions: int | None = None
    """Most tokens of a row."""
    label_positions: int | None = None
    """Most tokens of a decoder's labels."""
    vocabulary: int | None = None
    pad_token: int | None = None
    """The config's padding token, used by models that pool the last token or count positions."""
    takes: frozenset[str] = frozenset()
    """Names of `forward`'s arguments."""
    takes_any: bool = False
    """`forward` takes any other arguments too."""
    flags: frozenset[str] = frozenset()
    """Arguments that are truth values."""
    needs_padding: bool = False
    """It classifies by a row's last token, but its config names no padding token."""
    virtual: int = 0
    """Tokens that a peft model puts before each row."""
    sees_ahead: bool = False
    """A causal head on an encoder: tokens see the tokens after them, and so an answer is seen in advance."""

    def placed(self, labels: list[int]) -> list[int]:
        """Labels at their own tokens, moved to where the model's loss expects them.

        Most causal models shift labels themselves; BART's, Marian's and a few others' decoders leave that to the
        caller.
        """
        return [*labels[1:], IGNORED] if self.name == "causal" and self.shift == 0 else labels


UNKNOWN = ModelKind("unknown", "the model, which was not given,", takes_any=True)


def kind_of(model: nn.Module) -> ModelKind:
    """The kind of a module, or of the model inside peft's and torch.compile's wrappers."""
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    name, sees_ahead = _named(inner, config)
    virtual = virtual_tokens(model)
    positions, label_positions = position_limits(inner)
    if name != "seq2seq":  # a decoder that reads the same tokens, as in BART's classifiers
        limits = [limit for limit in (positions, label_positions) if limit is not None]
        positions, label_positions = min(limits, default=None), None
    heads = name in ("classification", "tokens")
    labels = getattr(config, "label2id", None) if heads else None
    arguments = inspect.signature(inner.forward).parameters.values()
    return ModelKind(
        name=name, model=type(inner).__name__, shift=int(name == "causal" and _shifts(type(inner))),
        classes=getattr(config, "num_labels", None) if heads else None,
        problem=_problem(config) if name == "classification" else None,
        class_ids=tuple((str(label), int(i)) for label, i in (labels or {}).items()),
        positions=None if positions is None else positions - virtual,
        label_positions=None if label_positions is None else label_positions - virtual,
        vocabulary=_vocabulary(inner), pad_token=_pad_token(config), virtual=virtual, sees_ahead=sees_ahead,
        needs_padding=name == "classification" and _pad_token(config) is None and _pools_last(config),
        takes=frozenset(a.name for a in arguments if a.kind is not a.VAR_KEYWORD),
        takes_any=any(a.kind is a.VAR_KEYWORD for a in arguments),
        flags=frozenset(a.name for a in arguments if "bool" in str(a.annotation)),
    )  # fmt: skip


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that peft or torch.compile wraps."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "active_peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner  # type: ignore[no-any-return]


@lru_cache
def _classes_by_kind() -> dict[str, Kind]:
    found: dict[str, Kind] = {}
    for kind, lists in _LISTS:
        for name in lists:
            for value in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).values():
                for cls in (value,) if isinstance(value, str) else value:
                    found.setdefault(cls, kind)
    for value in modeling_auto.MODEL_MAPPING_NAMES.values():
        for cls in (value,) if isinstance(value, str) else value:
            found.setdefault(cls, "bare")
    return found


def _named(model: nn.Module, config: Any) -> tuple[Kind, bool]:
    """The kind, and whether it is a causal head that sees ahead."""
    known = _classes_by_kind()
    own = getattr(config, "auto_map", None) or {}
    mine = {_class_of(value): _BY_AUTO_CLASS[auto] for auto, value in own.items() if auto in _BY_AUTO_CLASS}
    names = [cls.__name__ for cls in type(model).__mro__]
    kind: Kind = next(({**mine, **known}[name] for name in names if name in mine or name in known), "other")
    if kind in _BY_ITS_CONFIG and getattr(config, "is_encoder_decoder", False):
        return "seq2seq", False
    if kind == "seq2seq":  # a model of sound or pictures that only decodes
        kind = "causal"
    return kind, kind == "causal" and _is_encoder(config)


def _class_of(value: Any) -> str:
    return str(value[0] if isinstance(value, (list, tuple)) else value).rpartition(".")[2]


def _is_encoder(config: Any) -> bool:
    """Whether attention is bidirectional: BERT-like models without `is_decoder`, and XLNet."""
    both = getattr(config, "model_type", None) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return (both and not getattr(config, "is_decoder", False)) or getattr(config, "attn_type", None) == "bi"


def _pools_last(config: Any) -> bool:
    """Whether a classifier's model is causal, so that its last token has seen the whole row."""
    kind = getattr(config, "model_type", None)
    lists = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return kind in lists[0] and kind not in lists[1]


def _problem(config: Any) -> str | None:
    if getattr(config, "problem_type", None) is not None:
        return str(config.problem_type)
    return "regression" if getattr(config, "num_labels", None) == 1 else None


def _vocabulary(model: nn.Module) -> int | None:
    get: Callable[[], Any] | None = getattr(model, "get_input_embeddings", None)
    try:
        rows = getattr(get(), "num_embeddings", None) if get is not None else None
    except (AttributeError, NotImplementedError):  # transformers' way to say that there are none
        return None
    return rows if isinstance(rows, int) and getattr(model, "main_input_name", "input_ids") == "input_ids" else None


def _pad_token(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "pad_token_id", None)
    return found if isinstance(found, int) and found >= 0 else None


def _shifts(cls: type[nn.Module]) -> bool:
    """Whether a causal model's loss compares each position with the next label, judged from its forward's code.

    Models that compute a cross-entropy themselves on unshifted labels do not.
    """
    if cls.__name__ in _UNSHIFTED:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):  # no source: as nearly all do
        return True
    nodes = list(ast.walk(tree))
    names = [
        n.attr if isinstance(n, ast.Attribute) else n.id for n in nodes if isinstance(n, (ast.Attribute, ast.Name))
    ]
    by_itself = any("crossentropy" in name.lower().replace("_", "") for name in names)
    sliced = (n.value for n in nodes if isinstance(n, ast.Subscript))
    shifted = any("label" in value.id for value in sliced if isinstance(value, ast.Name))
    return not by_itself or shifted or any("shift" in name.lower() for name in names)
