"""Tasks: one TOML file describes a data set's files, the prompt made from a row, and the scoring of answers.

    about = "..."
    [files]                         # by split: file names to try in the folder, in order
    train = ["train.jsonl"]
    dev = ["val.jsonl", "dev.jsonl"]
    [read]
    format = "jsonl"                # jsonl, json, tsv, csv, trees, trec; default: by the file's suffix
    each = ["passage.questions"]    # one row per element of this list in a record; a second list is inside an element
    skip = { gold_label = ["-"] }   # records that are left out
    [columns]                       # a row's columns, as paths in the record; default: the record's own
    text = "passage.text"
    label = ["label", "answer"]     # the first of these that exists
    link = { path = "question", map = { cause = "because", effect = "so" } }
    [prompt]                        # options of the data, as `fit` takes them: template, verbalizers, loss, ...
    [score]                         # generate = true: texts are generated and compared with those in column `answers`

The papers' tasks are in papers/; your own task is a path to such a file. A name is looked up in the innermost element
of `each` that has it; "answers.0.text" is the first answer's text, "answers.*.text" the list of all.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DataError
from ..system.nearest import did_you_mean
from ..system.plain import is_whole, user_path
from .task_files import FORMATS, read_records

PAPERS = Path(__file__).parent / "papers"
_SECTIONS: dict[str, set[str] | None] = {
    "about": None, "files": None, "columns": None, "read": {"format", "each", "skip"},
    "prompt": {"template", "verbalizers", "label_column", "target_column", "loss", "max_length", "text_column"},
    "score": {"generate", "answers", "max_new_tokens"},
}  # fmt: skip


@dataclass(frozen=True)
class Scoring:
    """Texts are generated, greedily, and compared with the row's answers by exact match and F1 over words."""

    answers: str
    """Column of the right answers, a text or a list of texts."""
    max_new_tokens: int = 32


@dataclass(frozen=True)
class DataTask:
    """A task's file. See the module's docstring."""

    name: str
    about: str
    files: Mapping[str, Sequence[str]]
    prompt: Mapping[str, Any]
    columns: Mapping[str, Any] = field(default_factory=dict)
    format: str | None = None
    each: Sequence[str] = ()
    skip: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    scoring: Scoring | None = None

    def rows(self, path: str | Path, split: str) -> list[dict[str, Any]]:
        """The rows of one split of a folder, or of a file. Raises DataError with the file and the row."""
        file = self._file(user_path(path), split)
        rows: list[dict[str, Any]] = []
        for number, record in enumerate(read_records(file, self.format)):
            where = f"{file} record {number}"
            for scope in _elements(record, list(self.each), where):
                if not any(_look(scope, name, where) in values for name, values in self.skip.items()):
                    rows.append(self._row(scope, where))
        if not rows:
            raise DataError(f"{file} holds no rows for task {self.name!r}.")
        return rows

    def has(self, path: str | Path, split: str) -> bool:
        """Whether a folder has that split."""
        folder = user_path(path)
        return folder.is_dir() and any((folder / name).is_file() for name in self.files.get(split, ()))

    def _file(self, path: Path, split: str) -> Path:
        if path.is_file():
            return path
        if not path.is_dir():
            raise DataError(f"{path} does not exist: task {self.name!r} reads a folder with its files, or one of them.")
        names = list(self.files.get(split, ()))
        if not names:
            raise DataError(f"task {self.name!r} has no {split} split: there are {', '.join(self.files)}.")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise DataError(f"{path} has no {' or '.join(names)}, which task {self.name!r} reads as {split}.")
        return found

    def _row(self, scope: list[Any], where: str) -> dict[str, Any]:
        if not self.columns:
            if not isinstance(scope[-1], Mapping):
                raise DataError(f"{where} is {str(scope[-1])[:60]!r}, not a row with columns: name them in [columns].")
            return dict(scope[-1])
        return {name: _column(scope, place, where) for name, place in self.columns.items()}


def find_task(name: str) -> DataTask:
    """A paper's task by its name, or your own by the path of its file. Raises DataError."""
    path = user_path(name)
    if path.suffix != ".toml":
        path = PAPERS / f"{name}.toml"
        if not path.is_file():
            known = task_names()
            raise DataError(f"task={name!r} is not known.{did_you_mean(name, [*known, *KINDS])} There are "
                            f"{', '.join(KINDS)}, {', '.join(known)}, and your own as FILE.toml.")  # fmt: skip
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"task={name!r} cannot be read: {error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"task={name!r} is not TOML: {error}.") from error
    return _made(path, found)


KINDS = ("auto", "lm", "classification", "prompt")
"""Values of `task` that are not a task's name: how a text is learned."""


def task_of(task: str | None) -> DataTask | None:
    """The data task that an option `task` names; None if the option says how a text is learned."""
    return None if task is None or task in KINDS else find_task(task)


def task_names() -> list[str]:
    return sorted(path.stem for path in PAPERS.glob("*.toml"))


def _made(path: Path, found: Mapping[str, Any]) -> DataTask:
    for section, values in found.items():
        if section not in _SECTIONS:
            raise DataError(f"{path}: [{section}] is not a section of a task.{did_you_mean(section, _SECTIONS)}")
        _expect(path, section, values, str if section == "about" else Mapping)
        known = _SECTIONS[section]
        for key in values if known is not None else ():
            if known is not None and key not in known:
                raise DataError(f"{path}: [{section}] has no {key!r}.{did_you_mean(key, known)}")
    read, score = found.get("read", {}), found.get("score", {})
    if (form := read.get("format")) is not None and (not isinstance(form, str) or form not in FORMATS):
        hint = did_you_mean(str(form), FORMATS)
        raise DataError(f"{path}: format={form!r}: choose one of {', '.join(FORMATS)}.{hint}")
    for section in ("files", "prompt"):
        if section not in found:
            raise DataError(f"{path}: [{section}] is missing.")
    if not _are_texts(each := read.get("each", [])):
        _wrong(path, "each", each, "a list of texts")
    for name, values in _expect(path, "skip", read.get("skip", {}), Mapping).items():
        _expect(path, f"skip {name}", values, list)
    files = {split: [names] if isinstance(names, str) else names for split, names in found["files"].items()}
    for split, names in files.items():
        if not names or not _are_texts(names):
            _wrong(path, f"files {split}", names, "a file's name, or a list of them")
    for name, place in found.get("columns", {}).items():
        _check_place(path, name, place)
    return DataTask(
        path.stem, found.get("about", ""), files, found["prompt"], found.get("columns", {}), form,
        read.get("each", ()), read.get("skip", {}), _scoring(path, score),
    )  # fmt: skip


def _scoring(path: Path, score: Mapping[str, Any]) -> Scoring | None:
    if not _expect(path, "generate", score.get("generate", False), bool):
        if score.get("generate") is None and score:
            raise DataError(f"{path}: [score] without generate = true scores nothing.")
        return None
    if not isinstance(answers := score.get("answers"), str):
        raise DataError(f"{path}: [score] generate = true needs answers, the column of right answers.")
    if not is_whole(tokens := score.get("max_new_tokens", 32), 1):
        _wrong(path, "max_new_tokens", tokens, "a whole number of at least 1")
    return Scoring(answers, tokens)


_WORDS: dict[Any, str] = {str: "a text", Mapping: "a table", bool: "true or false", list: "a list"}
_PLACES = {"path": str, "drop_answer": str, "slice_of": str, "minus": str, "map": Mapping, "prefix": str, "list": bool}


def _expect(path: Path, what: str, value: Any, kind: Any) -> Any:
    return value if isinstance(value, kind) else _wrong(path, what, value, _WORDS[kind])


def _wrong(path: Path, what: str, value: Any, expected: str) -> NoReturn:
    raise DataError(f"{path}: {what} = {value!r}: expected {expected}.")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_place(path: Path, column: str, place: Any) -> None:
    """Check a column's place: a path, a list of paths of which the first existing one is used, or a table."""
    if isinstance(place, Mapping):
        for key, value in place.items():
            if key not in _PLACES:
                raise DataError(f"{path}: column {column!r} has no {key!r}.{did_you_mean(key, _PLACES)}")
            _expect(path, f"{column}.{key}", value, _PLACES[key])
        if not {"path", "drop_answer"} & set(place):
            raise DataError(f"{path}: column {column!r} names no path.")
    elif not isinstance(place, str) and not (place and _are_texts(place)):
        _wrong(path, f"column {column}", place, "a path, a list of them, or a table")


def sampled(rows: Sequence[Any], count: int | None, seed: int, what: str = "rows") -> Sequence[Any]:
    """`count` of the rows, chosen by the seed, in their own order; None: all. Raises DataError if there are fewer."""
    if count is None or count == len(rows):
        return rows
    if not 0 < count <= len(rows):
        raise DataError(f"{count} {what} were asked for, and there are {len(rows)}.")
    chosen = random.Random(f"{what} {seed}").sample(range(len(rows)), count)
    return [rows[i] for i in sorted(chosen)]


# ---- records into rows -----------------------------------------------------------------------------------------------


def _elements(record: Any, each: list[str], where: str, scope: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    """For each combination of elements of the nested lists `each`: the record and those elements, innermost last."""
    scope = (*scope, record)
    if not each:
        yield list(scope)
        return
    found = record if each[0] == "*" else _look(list(scope), each[0], where)
    if not isinstance(found, (Mapping, list)):
        raise DataError(f"{where}: {each[0]!r}, named by each, is {str(found)[:60]!r}, not a list.")
    for element in found.values() if isinstance(found, Mapping) else found:
        yield from _elements(element, each[1:], where, scope)


_ABSENT = object()


def _look(scope: Sequence[Any], path: str, where: str) -> Any:
    """The value at a path in the innermost element that has it. Raises DataError."""
    for element in reversed(scope):
        found = _at(element, path.split("."))
        if found is not _ABSENT:
            return found
    names = sorted({str(name) for element in scope if isinstance(element, Mapping) for name in element})
    raise DataError(f"{where} has no {path!r}: there are {', '.join(names)}.")


def _at(value: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return value
    part, rest = parts[0], parts[1:]
    if part == "*" and isinstance(value, list):
        return [_at(item, rest) for item in value]
    if isinstance(value, list) and part.isdigit() and int(part) < len(value):
        return _at(value[int(part)], rest)
    return _at(value[part], rest) if isinstance(value, Mapping) and part in value else _ABSENT


def _column(scope: list[Any], place: Any, where: str) -> Any:
    """A column's value: at a path, at the first existing path of several, or made by a table."""
    if isinstance(place, str):
        return _look(scope, place, where)
    if isinstance(place, list):
        for path in place[:-1]:
            if any(_at(element, path.split(".")) is not _ABSENT for element in scope):
                return _look(scope, path, where)
        return _look(scope, place[-1], where)
    try:
        return _made_column(scope, place, where)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise DataError(f"{where} is not what the task's column {dict(place)} reads: {error!r}.") from error


def _made_column(scope: list[Any], place: Mapping[str, Any], where: str) -> Any:
    """A column's value, made by the rules of a table."""
    of_drop = "drop_answer" in place
    found = _look(scope, place["drop_answer" if of_drop else "path"], where)
    value: Any = _drop_answer(found) if of_drop else found
    if "slice_of" in place:  # characters from start to end, the last one included
        text = _look(scope, place["slice_of"], where)
        value = list(dict.fromkeys(text[span["start"] : span["end"] + 1] for span in value))
    if "minus" in place:  # another right answer must not count as wrong
        others = _look(scope, place["minus"], where)
        value = [item for item in value if item not in others[1:] or item == others[0]]
    if "map" in place:
        if str(value) not in place["map"]:
            raise DataError(f"{where}: {place['path']}={value!r}, but the task knows only {', '.join(place['map'])}.")
        value = place["map"][str(value)]
    if "prefix" in place:  # an answer continues its prompt
        value = f"{place['prefix']}{value}"
    return [value] if place.get("list") else value


def _drop_answer(answer: Mapping[str, Any]) -> str:
    """DROP's number, spans or date as a text."""
    date = answer.get("date") or {}
    parts = [date.get(name) or "" for name in ("day", "month", "year")]
    return answer.get("number") or ", ".join(answer.get("spans") or ()) or " ".join(part for part in parts if part)
