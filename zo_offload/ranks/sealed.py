"""What a pool's members read and write in the store: JSON under names, sealed with the pool's token.

torch's store asks nobody who he is: whoever reaches its port may read and write all of it. A value that was not written
by one who has the token, or was written under another name or for an earlier keeper, has not the seal, and is an error
where it is read. So a stranger can disturb a pool, and not tell it numbers. Nothing is secret on the wire: tunnel it.

    era                  made by each keeper that begins: seals of another one's time are void
    value                32 hex digits of blake2b(key=token | era, name, text), then the text
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import zlib
from collections.abc import Mapping
from typing import Any

from ..errors import RankError
from .line import PAYLOAD_BYTES, Line

ERA = "zo_offload/era"
_SEAL = 32
_PART = PAYLOAD_BYTES // 2
MAX_TEXT_BYTES = 1 << 30
"""What is told in parts is not longer than this when it is unpacked."""


class Sealed:
    """Values of JSON in a store. One thread at a time."""

    def __init__(self, line: Line, token: str, era: str) -> None:
        self.line, self.era = line, era
        self._key = hashlib.blake2b(f"{token}\0{era}".encode()).digest()

    def close(self) -> None:
        self.line.close()

    def _seal(self, name: str, text: bytes) -> bytes:
        return hashlib.blake2b(name.encode() + b"\0" + text, key=self._key, digest_size=_SEAL // 2).hexdigest().encode()

    def _pack(self, name: str, values: Mapping[str, Any]) -> bytes:
        text = json.dumps(values).encode()
        return self._seal(name, text) + text

    def _unpack(self, name: str, value: bytes) -> dict[str, Any]:
        seal, text = value[:_SEAL], value[_SEAL:]
        if not hmac.compare_digest(seal, self._seal(name, text)):
            raise Unsealed(
                f"{name!r} in the pool's store has not this token's seal: tokens differ, or a stranger writes there"
            )
        found = json.loads(text)
        if not isinstance(found, dict):
            raise Unsealed(f"{name!r} in the pool's store is not what a member writes")
        return found

    def put(self, name: str, values: Mapping[str, Any]) -> None:
        self.line.set(name, self._pack(name, values))

    def get(self, name: str) -> dict[str, Any] | None:
        """None where there is none. Raises `Unsealed`."""
        found = self.line.get(name)
        return None if found is None else self._unpack(name, found)

    def first(self, named: Mapping[str, Mapping[str, Any]]) -> None:
        """Write each of these, unless somebody has."""
        self.line.first_of_all({name: self._pack(name, values) for name, values in named.items()})

    def get_all(self, names: list[str]) -> list[dict[str, Any] | Unsealed]:
        """Of names that all have a value; in place of one without the seal, what is to be raised of it."""
        return [self._opened(name, value) for name, value in zip(names, self.line.get_all(names), strict=True)]

    def _opened(self, name: str, value: bytes) -> dict[str, Any] | Unsealed:
        try:
            return self._unpack(name, value)
        except Unsealed as error:
            return error

    # ---- what is longer than a value ---------------------------------------------------------------------------------

    def send(self, name: str, values: Mapping[str, Any]) -> list[str]:
        """Of any length, packed and in parts; the names that it takes up."""
        text = base64.b64encode(zlib.compress(json.dumps(values).encode(), 1)).decode()
        parts = [text[i : i + _PART] for i in range(0, len(text), _PART)]
        for number, part in enumerate(parts):
            self.put(f"{name}/{number}", {"part": part})
        self.put(name, {"parts": len(parts)})
        return [name, *(f"{name}/{number}" for number in range(len(parts)))]

    def receive(self, name: str) -> dict[str, Any] | None:
        """What was sent under a name, which is free then; None: nothing yet."""
        head = self.get(name)
        if head is None:
            return None
        names = [f"{name}/{number}" for number in range(head["parts"])]
        found = [self.get(part) for part in names]
        self.line.delete(*names, name)
        text = "".join(part["part"] for part in found if part is not None)
        unpacker = zlib.decompressobj()
        values: dict[str, Any] = json.loads(unpacker.decompress(base64.b64decode(text), MAX_TEXT_BYTES))
        return values


class Unsealed(RankError):
    """A value that nobody with the token wrote."""
