"""Values of a pool's store: JSON under names, sealed with the pool's token.

torch's store has no authentication: anyone who reaches its port may read and write all of it. A value that was written
without the token, under another name, or for an earlier keeper does not have the right seal, and reading it is an
error. So a stranger can disturb a pool, but cannot give it numbers. Nothing on the wire is secret: use a tunnel.

    era                  made by each keeper at its start: seals of earlier eras are invalid
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
"""Largest unpacked size of a value that is sent in parts."""


class Sealed:
    """Sealed JSON values in a store. One thread at a time."""

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
                f"{name!r} in the pool's store lacks this token's seal: tokens differ, or a stranger writes there"
            )
        found = json.loads(text)
        if not isinstance(found, dict):
            raise Unsealed(f"{name!r} in the pool's store is not what a member writes")
        return found

    def put(self, name: str, values: Mapping[str, Any]) -> None:
        self.line.set(name, self._pack(name, values))

    def get(self, name: str) -> dict[str, Any] | None:
        """A value; None if there is none. Raises `Unsealed`."""
        found = self.line.get(name)
        return None if found is None else self._unpack(name, found)

    def first(self, named: Mapping[str, Mapping[str, Any]]) -> None:
        """Write each of these values, unless it exists already."""
        self.line.first_of_all({name: self._pack(name, values) for name, values in named.items()})

    def get_all(self, names: list[str]) -> list[dict[str, Any] | Unsealed]:
        """Values of names that all have one; a value without the right seal is replaced by its error."""
        return [self._opened(name, value) for name, value in zip(names, self.line.get_all(names), strict=True)]

    def _opened(self, name: str, value: bytes) -> dict[str, Any] | Unsealed:
        try:
            return self._unpack(name, value)
        except Unsealed as error:
            return error

    # ---- long values -------------------------------------------------------------------------------------------------

    def send(self, name: str, values: Mapping[str, Any]) -> list[str]:
        """Write values of any length, packed and in parts; returns the names used."""
        text = base64.b64encode(zlib.compress(json.dumps(values).encode(), 1)).decode()
        parts = [text[i : i + _PART] for i in range(0, len(text), _PART)]
        for number, part in enumerate(parts):
            self.put(f"{name}/{number}", {"part": part})
        self.put(name, {"parts": len(parts)})
        return [name, *(f"{name}/{number}" for number in range(len(parts)))]

    def receive(self, name: str) -> dict[str, Any] | None:
        """Read values that were sent under a name, and free it; None: nothing yet."""
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
    """A value that was written without the token."""
