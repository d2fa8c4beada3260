"""Rows of instruction data, recognised by their columns: conversations, and instructions with their outputs.

messages         [{"role": "user", "content": ...}, ...]      through the tokenizer's chat template
conversations    [{"from": "human", "value": ...}, ...]       the same
prompt, completion, both lists of messages                    the same, one after the other
instruction, (input,) output                                  the same; without a chat template as PLAIN has it
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from .texts import check_unicode

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLAIN = ("### Instruction:\n{instruction}\n\n", "### Input:\n{input}\n\n", "### Response:\n")


def has_conversation(row: Mapping[str, Any]) -> bool:
    whole = any(isinstance(row.get(name), (list, tuple)) for name in ("messages", "conversations"))
    return whole or _is_split(row)


def _is_split(row: Mapping[str, Any]) -> bool:
    """Whether a prompt and its completion are lists of messages."""
    return all(
        isinstance(row.get(name), (list, tuple)) and any(isinstance(m, Mapping) for m in row[name])
        for name in ("prompt", "completion")
    )


def is_instruction(row: Mapping[str, Any]) -> bool:
    return {"instruction", "output"} <= set(row)


def messages_of(row: Mapping[str, Any]) -> Any:
    """A row's messages, with roles that chat templates know; unchanged if they have another form."""
    if "messages" in row:
        return row["messages"]
    if "conversations" in row:
        said = row["conversations"]
        if all(isinstance(m, Mapping) and m.get("from") in _ROLES and "value" in m for m in said):
            return [{"role": _ROLES[m["from"]], "content": m["value"]} for m in said]
        return said
    if _is_split(row):
        return [*row["prompt"], *row["completion"]]
    asked = "\n\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def rendered(tokenizer: Any, messages: Any, where: str) -> tuple[str, str]:
    """A conversation through the chat template: the text before the answer, and the answer, which is the last message.
    Raises DataError for anything but a conversation, and for empty messages."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise DataError(f"{where} holds messages, and the tokenizer has no chat template: set its chat_template.")
    said = isinstance(messages, (list, tuple)) and all(isinstance(m, Mapping) and "role" in m for m in messages)
    if not said or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: messages must be dicts with a role and end with one of the assistant's.")
    for i, message in enumerate(messages):
        _check_content(message, f"{where}: message {i}", answers=i == len(messages) - 1)
    render = tokenizer.apply_chat_template
    whole = render(list(messages), tokenize=False)
    starts = [render(list(messages[:-1]), tokenize=False, add_generation_prompt=ask) for ask in (True, False)]
    start = next((start for start in starts if whole.startswith(start) and len(whole) > len(start)), None)
    if start is None:
        raise DataError(f"{where}: the chat template does not put the last message at the end.")
    return start, whole[len(start) :]


def _check_content(message: Mapping[str, Any], what: str, *, answers: bool) -> None:
    """Raise DataError for a message without content: a template would write "None" or nothing in its place."""
    content = message.get("content")
    if message.get("tool_calls") and not content:
        return
    if isinstance(content, (list, tuple)) and content:
        return  # a list of parts, which only the template understands
    if content is None or (isinstance(content, float) and math.isnan(content)) or isinstance(content, (list, tuple)):
        raise DataError(f"{what}, the {message['role']}'s, has no content ({content!r}). Remove such rows.")
    if isinstance(content, str):
        check_unicode(content, what)
    if answers and not str(content).strip():
        raise DataError(f"{what} is the assistant's answer, and it is empty. Remove such rows.")


def instruction_template(row: Mapping[str, Any]) -> str:
    """A template for a row of instruction and output, if the tokenizer has none of its own."""
    return "".join(part for part in PLAIN if "{input}" not in part or row.get("input"))
