"""Seeded mutations of files: bytes of any file, and keys and values of JSON wherever a format holds some."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard
from mutation_places import gguf_regions

DEEP = (120, 900, 100_000)  # levels of nesting: two that Python parses, and one beyond its recursion limit
ODD = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**62, 10**400, -0.5, 1e308, float("nan"), float("inf"), "", "x", "../x",
    "a\0b", "y" * 5000, "F32", "0" * 64, [], [0], [[]], ["x", None], {}, {"a": 1}, {"": None},
]  # fmt: skip
FLIPPED = 8  # most bytes that one mutation changes


def truncate(data: bytes, chance: random.Random) -> bytes:
    """Cut off the end."""
    return data[: chance.randrange(len(data))] if data else data


def flip(data: bytes, chance: random.Random) -> bytes:
    """Change a few bytes, half of the time near the start, where headers are."""
    found, end = bytearray(data), len(data) if chance.random() < 0.5 else min(len(data), 200)
    for _ in range(chance.randint(1, FLIPPED)):
        if end:
            found[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(found)


def zero(data: bytes, chance: random.Random) -> bytes:
    """Set a block to zeros, as a file system does after a power loss."""
    start = chance.randrange(len(data) + 1)
    size = min(len(data) - start, chance.randint(1, 4096))
    return data[:start] + bytes(size) + data[start + size :]


def insert(data: bytes, chance: random.Random) -> bytes:
    """Insert random bytes."""
    start = chance.randrange(len(data) + 1)
    return data[:start] + chance.randbytes(chance.randint(1, 64)) + data[start:]


def replace(data: bytes, chance: random.Random) -> bytes:
    """Put something else in place of the whole file."""
    return chance.choice([b"", b"\n", b"{}", b"[]", b"null", b"<html></html>\n", chance.randbytes(max(1, len(data)))])


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    function.__name__: function for function in (truncate, flip, zero, insert, replace)
}


def _nodes(value: Any, holders: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        holders.append((value, key))
        _nodes(inner, holders)
    return holders


def change_json(text: str, chance: random.Random) -> str:
    """Delete or rename a key, or give it another value: of another type, huge, or nested without end."""
    content = json.loads(text)
    nodes, levels = _nodes(content, []), chance.choice(DEEP)
    if not nodes:
        return "[" * levels
    for _ in range(chance.choice((1, 1, 2))):
        holder, key = chance.choice(nodes)
        way = chance.choice(("delete", "rename", "value", "value", "value", "number", "deep"))
        if isinstance(holder, dict) and key not in holder:
            continue
        if way == "delete" and isinstance(holder, dict):
            del holder[key]
        elif way == "rename" and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        elif way == "number" and isinstance(holder[key], int | float):
            holder[key] = chance.choice((holder[key] + 1, -holder[key], holder[key] * 2**40, str(holder[key])))
        elif way == "deep":
            holder[key] = "DEEP"
        else:
            holder[key] = chance.choice(ODD)
    return json.dumps(content).replace('"DEEP"', "[" * levels + "]" * levels)


def _whole_json(data: bytes, chance: random.Random) -> bytes:
    return change_json(data.decode(), chance).encode()


def _json_line(data: bytes, chance: random.Random) -> bytes:
    lines = data.decode().splitlines()
    place = chance.randrange(len(lines))
    lines[place] = change_json(lines[place], chance)
    return "\n".join([*lines, ""]).encode()


def _json_header(data: bytes, chance: random.Random) -> bytes:
    """Change the header of safetensors; sometimes also its length, which comes before it."""
    size = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + size].decode(), chance).encode()
    length = len(header) if chance.random() < 0.8 else chance.choice((0, 1, 2**40, 2**63))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def _array_header(data: bytes, chance: random.Random) -> bytes:
    """Change the header of .npy, and keep its length."""
    size = int.from_bytes(data[8:10], "little")
    shapes = (
        "(99999999999, 99999999999)",
        "(-4, 8)",
        "(4, 8.0)",
        "(4,)",
        "()",
        "(4, 'a')",
        "[4, 8]",
        "(" * 40,
        "(0, 8)",
    )
    descriptions = ("'|O'", "'<f8'", "'<U9'", "'>i4'", "[('a', '<i4')]", "'<i99'", "None", "'<m8[ns]'", "'<u2'")
    description, shape = chance.choice(["'<i4'", *descriptions]), chance.choice(["(4, 8)", *shapes])
    header = f"{{'descr': {description}, 'fortran_order': {chance.choice((False, True, 3))}, 'shape': {shape}}}"
    return data[:10] + header.encode()[: size - 1].ljust(size - 1) + b"\n" + data[10 + size :]


def _gguf_part(data: bytes, chance: random.Random) -> bytes:
    """Overwrite a number or a text of the metadata, or of the table of tensors."""
    regions = [region for region in gguf_regions(data) if not region[0].startswith("values of")]
    _, start, stop = chance.choice([region for region in regions if region[2] - region[1] <= 64])
    size = stop - start
    number = int.from_bytes(data[start:stop], "little")
    changed = (
        0,
        number + 1,
        number << 1,
        number << 20,
        (1 << 8 * size) - 1,
        1 << 8 * size - 1,
        chance.getrandbits(8 * size),
    )
    return data[:start] + (chance.choice(changed) % (1 << 8 * size)).to_bytes(size, "little") + data[stop:]


STRUCTURES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": _whole_json,
    ".jsonl": _json_line,
    ".safetensors": _json_header,
    ".npy": _array_header,
    ".gguf": _gguf_part,
}
UNPACK = {".gz": (gzip.decompress, gzip.compress), ".zst": (zstandard.decompress, zstandard.compress)}


def mutate(file: Path, chance: random.Random) -> str:
    """Mutate a file in place, in a way that suits its name; return the name of the mutation."""
    data, name = file.read_bytes(), file.name
    pack = None
    for suffix, (unpack, packed) in UNPACK.items():
        if name.endswith(suffix) and chance.random() < 0.5:
            data, name, pack = unpack(data), name.removesuffix(suffix), packed
    structure = STRUCTURES.get(Path(name).suffix)
    if structure is not None and chance.random() < 0.6:
        way, found = "structure", structure(data, chance)
    else:
        way = chance.choice([*BYTES])
        found = BYTES[way](data, chance)
    file.write_bytes(found if pack is None else pack(found))
    return way
