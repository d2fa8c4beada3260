"""Generated texts compared with right answers: exact match, and F1 over words, as SQuAD scores them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words_of(text: str) -> list[str]:
    """The text's words, in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(said: str, answers: Sequence[str]) -> float:
    return float(any(words_of(said) == words_of(answer) for answer in answers))


def f1(said: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall, for the best of the answers."""
    return max(_f1(words_of(said), words_of(answer)) for answer in answers)


def _f1(said: list[str], answer: list[str]) -> float:
    if not said or not answer:
        return float(said == answer)
    common = sum((Counter(said) & Counter(answer)).values())
    return 2 * common / (len(said) + len(answer))
