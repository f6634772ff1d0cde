"""Mutations for `faults.fuzz` that know no format: bytes, text, and trees of JSON."""

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)

# Bytes


def flip_bits(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if result else 0):
        result[_place(rng, result)] ^= 1 << rng.randrange(8)
    return bytes(result)


def set_bytes(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if result else 0):
        result[_place(rng, result)] = rng.randrange(256)
    return bytes(result)


def set_integer(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """An integer field, wherever it may be, becomes very large, very small, or one more than it was."""
    width = rng.choice((1, 2, 4, 8))
    if len(content) < width:
        return content
    at, order = _place(rng, content[width - 1 :]), rng.choice(("little", "big"))
    value = int.from_bytes(content[at : at + width], order) + rng.choice((-1, 1))
    value = rng.choice((value, rng.choice(EXTREMES), rng.randrange(1 << (8 * width))))
    return content[:at] + (value % (1 << (8 * width))).to_bytes(width, order) + content[at + width :]


def truncate(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    return content[: rng.choice((0, 1, len(content) - 1, rng.randrange(len(content) + 1), rng.randrange(64)))]


def insert(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    at, count = _place(rng, content), rng.choice((1, 4, 64, 4096))
    return content[:at] + rng.choice((bytes(count), b"\xff" * count, rng.randbytes(count))) + content[at:]


def delete(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    start, end = _range(rng, content)
    return content[:start] + content[end:]


def repeat(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    start, end = _range(rng, content)
    return content[:end] + content[start:end] * rng.choice((1, 1, 2, 20)) + content[end:]


def splice(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """The beginning of one file and the end of another."""
    other = rng.choice(seeds)
    return content[: _place(rng, content)] + other[_place(rng, other) :]


BYTES = (flip_bits, set_bytes, set_integer, truncate, insert, delete, repeat, splice)


def _place(rng: random.Random, content: bytes | bytearray) -> int:
    """Anywhere, but as often among the first or last 256 bytes: that is where headers and directories are."""
    count = max(1, len(content))
    return rng.choice(
        (rng.randrange(count), rng.randrange(min(256, count)), count - 1 - rng.randrange(min(256, count)))
    )


def _range(rng: random.Random, content: bytes) -> tuple[int, int]:
    start = _place(rng, content)
    return start, min(len(content), start + rng.choice((1, 2, 8, 64, 1024)))


# Text

WORDS = (
    *("", " ", "0", "-0", "-1", "1", "2147483648", "9223372036854775808", "1" * 400, "1" * 5000, "1e999", "-1e999"),
    *("nan", "NaN", "Infinity", "-inf", "0x" + "f" * 5000, "0b" + "1" * 20000, "1_000", "٣", "²", "null", "None", "~"),
    *("true", "False", "yes", "none", '"', "'", "\\", "/", "..", "../../etc/passwd", "/dev/zero", "/dev/stdin", "-"),
    *("--", "=", "%s", "%(prog)s", "{0}", "{", "}", "[", "]", "[[", "&a", "*a", "!!python/object/apply:os.getcwd []"),
    *(
        "a" * 3000,
        "ä",
        "\u202e",
        "\u2028",
        "\x85",
        "\x0b",
        "\x1b[2J",
        "\x7f",
        "\ufeff",
        "\U0010ffff",
        "\x00",
        "é" * 300,
    ),
    *("#", ",", ";", "\t", "\n", "\r\n", "\r", ":", ": ", "- ", "? ", "| ", "> ", "<<: ", "2024-02-30", "12:30:45"),
)


def replace_word(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A word or a number becomes another one: odd, or from another file."""
    found = list(re.finditer(rb"[\w.+-]+", content))
    if not found:
        return content
    match = rng.choice(found)
    others = re.findall(rb"[\w.+-]+", rng.choice(seeds)) or [b""]
    word = rng.choice((rng.choice(WORDS).encode(), rng.choice(others)))
    return content[: match.start()] + word + content[match.end() :]


def insert_word(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(WORDS).encode() + content[at:]


def mix_lines(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A line is left out, doubled, exchanged with another, or comes from another file."""
    lines = content.splitlines(keepends=True) or [b""]
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(to, lines[at])
    elif kind == 2:
        lines[at], lines[to] = lines[to], lines[at]
    else:
        lines.insert(at, rng.choice(rng.choice(seeds).splitlines(keepends=True) or [b""]))
    return b"".join(lines)


def recode(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """Another encoding, other line ends, a byte order mark."""
    kind = rng.randrange(5)
    if kind < 2:
        return content.decode("utf-8", "replace").encode(("utf-16", "latin-1")[kind], "replace")
    return (b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r"), content.replace(b"\n", b"\r\n"))[kind - 2]


TEXT = (replace_word, replace_word, insert_word, mix_lines, recode, *BYTES)

# Trees of JSON


def odd_value(rng: random.Random, like: Any = None) -> Any:
    """A value of any type that JSON knows; sometimes deep, long, or just beside `like`."""
    kind = rng.randrange(10)
    if kind == 0 and isinstance(like, int | float):
        return rng.choice((-like, like + 1, like * 2**31, like * 0.5, str(like)))
    if kind == 1:
        return [like] * rng.choice((0, 1, 2, 100))
    if kind == 2:
        return {rng.choice(WORDS): like}
    if kind < 5:
        return rng.choice(WORDS)
    if kind < 7:
        return rng.choice((0, 1, -1, 7, 2**31, -(2**31), 2**63, 2**64, 10**30, 10**400))
    if kind < 8:
        return rng.choice((0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")))
    return rng.choice((None, True, False, [], {}, [[]], {"": {}}))


def mutate_tree(rng: random.Random, tree: Any, odd: Callable[[random.Random, Any], Any] = odd_value) -> Any:
    """The tree with one place changed: another value, an entry left out, doubled, renamed."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(tree)
    if not places or rng.random() < 0.02:
        return odd(rng, tree)
    node, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1:
        _, taken = rng.choice(places)
        if isinstance(node, dict):
            node[rng.choice((*WORDS, str(taken)))] = node.pop(key)
        else:
            node.append(node[key])
    elif kind == 2:
        other, taken = rng.choice(places)
        node[key] = copy.deepcopy(other[taken])
    else:
        node[key] = odd(rng, node[key])
    return tree


def mutate_json(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A place of a JSON document becomes something else; duplicate keys now and then."""
    try:
        text = json.dumps(mutate_tree(rng, json.loads(content)), ensure_ascii=rng.random() < 0.5)
    except (ValueError, RecursionError):  # no JSON any more, after a mutation before this one
        return flip_bits(rng, content, seeds)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]
    return text.encode("utf-8", "replace")


def nest(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """The document, or nothing, inside very many brackets."""
    depth = rng.choice((50, 900, 5000, 50000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"[{", b"}]"), (b'{"a":[', b"]}"), (b"[", b"")))
    return opening * depth + rng.choice((content[:4096], b"", b"1")) + closing * depth


JSON = (mutate_json, mutate_json, mutate_json, nest, *TEXT)
