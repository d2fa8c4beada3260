"""An independent reader of a run directory (docs/file_formats.md): prints its journal and checks its block files.

python examples/read_run.py runs/a
"""

import json
import struct
import sys
import zlib
from hashlib import blake2b
from pathlib import Path

import numpy as np

HISTORY = ("base", "plan", "trainable", "storage", "fold_every", "rounding", "seed", "noise", "method", "gains")


def read_journal(data):
    """(header, steps, notes, names); names[t]: what a block file of magic m calls the weights after t steps, by m."""
    magic, length = struct.unpack_from("<4sI", data)
    crc = zlib.crc32(data[: 8 + length])
    assert magic in (b"ZOJ4", b"ZOJ3", b"ZOJ2") and struct.unpack_from("<I", data, 8 + length) == (crc,)
    header, steps, notes, updates, scalars, text = json.loads(data[8 : 8 + length]), [], [], [], [], b""
    named = json.dumps({key: header.get(key) for key in HISTORY}, sort_keys=True, separators=(",", ":")).encode()
    history, hashed = blake2b(named, digest_size=8).digest(), b""
    names = [{b"ZOB3": int.from_bytes(history, "little"), b"ZOB2": 0}]
    for at in range(12 + length, len(data) - 63, 64):
        step, seed, coeff, decay, loss, grad, lr, flags, batch, _, found = struct.unpack_from("<QQffdddIIII", data, at)
        crc = zlib.crc32(data[at : at + 60], crc)
        if crc != found:
            break  # the tail of a crash, or damage
        if flags & 16:  # a note
            text += data[at + 8 : at + 8 + struct.unpack_from("<I", data, at + 52)[0]]
            if not flags & 4:
                notes, text = [*notes, (step, json.loads(text))], b""
            continue
        part, count, found = data[at + 8 : at + 48], batch, []
        if flags & 32:  # noises
            found = [(*struct.unpack_from("<Qf", part, 12 * i), 1.0, flags & (i == count - 1)) for i in range(count)]
        elif flags & 64:
            scalars += struct.unpack_from(f"<{count}d", part)
        else:
            about = dict(step=step, loss=loss, grad=grad, lr=lr, flags=flags, batch=batch)
            found = [] if flags & 2 else [(seed, coeff, decay, flags & 1)]  # 2: skipped
        updates += [update[:3] for update in found]
        hashed += b"".join(struct.pack("<QffB", *update) for update in found)
        if not flags & 4:  # the step's last record
            steps.append(dict(**about, updates=updates, scalars=scalars))
            flags = about["flags"]
            head = history + struct.pack("<QB", step, flags & (2 | 8))
            history = blake2b(head + hashed, digest_size=8).digest()
            names.append({b"ZOB3": int.from_bytes(history, "little"), b"ZOB2": crc})
            updates, scalars, hashed = [], [], b""
    return header, steps, notes, names


def mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def checksum(data, offset):
    """Of a range of a block that begins at its byte `offset`."""
    golden, pages = np.uint64(0x9E3779B97F4A7C15), -(-len(data) // 4096)
    weights = (mix(np.arange(1, 1025, dtype=np.uint64) * golden) >> np.uint64(32)) | np.uint64(1)
    words = np.frombuffer(data.ljust(pages * 4096, b"\0"), "<u4").reshape(pages, 1024).astype(np.uint64)
    begins = np.arange(pages, dtype=np.uint64) * np.uint64(4096) + np.uint64(offset + 1)
    return int(mix((words * weights).sum(axis=1, dtype=np.uint64) ^ begins * golden).sum(dtype=np.uint64))


def read_block(data, nbytes, streamed, spans):
    """{generation: (version, (magic, name of its steps), the block's bytes)} of those that are whole and sound."""
    found, second = {}, 8192 + -(-nbytes // 4096) * 4096
    for generation in (0, 1):
        head = data[4096 * generation :][:92]
        magic, _, state, chain, version, *numbers, history = struct.unpack_from("<4s3I9Q", head)
        end = 80 if magic == b"ZOB2" else 88
        if struct.unpack_from("<I", head, end) != (zlib.crc32(head[:end]),) or magic not in (b"ZOB3", b"ZOB2"):
            continue  # never written, or damaged
        block, at = bytearray(data[8192 : 8192 + nbytes]), second
        trained = np.zeros(nbytes, bool)
        for offset, length in spans:
            trained[offset : offset + length] = True
            if generation == 1:
                block[offset : offset + length] = data[at : at + length]
                at += length
        sums, edges = [0, 0, 0, 0], {0, streamed, nbytes, *(e for offset, n in spans for e in (offset, offset + n))}
        for begin, end in zip(sorted(edges)[:-1], sorted(edges)[1:], strict=True):
            sums[2 * (begin >= streamed) + (not trained[begin])] += checksum(bytes(block[begin:end]), begin)
        if state == 1 and numbers == [nbytes, streamed, int(trained.sum()), *(s % 2**64 for s in sums)]:
            found[generation] = version, (magic, chain if magic == b"ZOB2" else history), bytes(block)
    return found


def main(run):
    header, steps, notes, names = read_journal((run / "journal.zoj").read_bytes())
    print(json.dumps(header, indent=1))
    for step, note in notes:
        print(f"after {step} steps: {json.dumps(note)}")
    for s in steps:
        print(f"step {s['step']}  loss {s['loss']!r}  grad {s['grad']!r}  lr {s['lr']!r}  {s['updates']}")
    shapes = run / "blocks" / "shapes.json"
    for index, shape in enumerate(json.loads(shapes.read_text()) if shapes.exists() else []):
        found = read_block((run / "blocks" / f"{index:05d}.zob").read_bytes(), *shape)
        for generation, (version, (magic, name), _) in found.items():
            known = version < len(names) and name == names[version][magic]
            print(f"block {index} generation {generation}: step {version}, {'of' if known else 'NOT OF'} this journal")
        if not found:
            print(f"block {index}: no generation is sound")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
