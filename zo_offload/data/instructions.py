"""Rows as instruction data has them, told by their columns: conversations, and instructions with their outputs.

messages         [{"role": "user", "content": ...}, ...]      through the tokenizer's chat template
conversations    [{"from": "human", "value": ...}, ...]       the same
instruction, (input,) output                                  the same; without a chat template as PLAIN has it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLAIN = ("### Instruction:\n{instruction}\n\n", "### Input:\n{input}\n\n", "### Response:\n")


def has_conversation(row: Mapping[str, Any]) -> bool:
    return any(isinstance(row.get(name), (list, tuple)) for name in ("messages", "conversations"))


def is_instruction(row: Mapping[str, Any]) -> bool:
    return {"instruction", "output"} <= set(row)


def messages_of(row: Mapping[str, Any]) -> Any:
    """The messages of a row that has some, in roles that chat templates know; as they are where they are something
    else."""
    if "messages" in row:
        return row["messages"]
    if "conversations" in row:
        said = row["conversations"]
        if all(isinstance(m, Mapping) and m.get("from") in _ROLES and "value" in m for m in said):
            return [{"role": _ROLES[m["from"]], "content": m["value"]} for m in said]
        return said
    asked = "\n\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def instruction_template(row: Mapping[str, Any]) -> str:
    """A template for a row of instruction and output, where the tokenizer has none of its own."""
    return "".join(part for part in PLAIN if "{input}" not in part or row.get("input"))
