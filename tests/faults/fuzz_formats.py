"""Mutations for `faults.fuzz` that know a format: zip, .npy, safetensors, pickles."""

import io
import json
import pickletools
import random
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from faults.fuzz_bytes import BYTES, EXTREMES, WORDS, flip_bits, mutate_tree, nest, odd_value

Member = tuple[str, bytes, int]  # name, content, how it is compressed

# Zip


def members(content: bytes) -> list[Member] | None:
    """What a zip holds; None where it is none any more."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            inside = [member for member in archive.infolist() if member.file_size < 1 << 22]
            return [(member.filename, archive.read(member), member.compress_type) for member in inside]
    except Exception:  # whatever a mutation before this one has broken
        return None


def zipped(inside: Sequence[Member]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, compression in inside:
            known = compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            archive.writestr(zipfile.ZipInfo(name), content, compression if known else zipfile.ZIP_STORED)
    return buffer.getvalue()


def mix_members(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A member is left out, doubled, renamed, compressed, damaged inside, or another file's."""
    inside = members(content)
    if not inside:
        return flip_bits(rng, content, seeds)
    at = rng.randrange(len(inside))
    name, part, compression = inside[at]
    kind = rng.randrange(7)
    if kind == 0:
        del inside[at]
    elif kind == 1:
        inside.append((name, rng.choice((part, b"", part[:-1])), compression))
    elif kind == 2:
        odd = rng.choice(WORDS).replace("\x00", "") or "."
        inside[at] = (rng.choice((odd, f"../{name}", f"/{name}", f"{name}/", odd + name)), part, compression)
    elif kind == 3:
        inside[at] = (name, part, zipfile.ZIP_DEFLATED)
    elif kind == 4:
        inside[at] = (name, rng.choice(BYTES)(rng, part, [part]), compression)
    elif kind == 5:
        inside += members(rng.choice(seeds)) or []
    else:
        inside.insert(at, (rng.choice((name, "a.npy", "a/data.pkl", "a/.format_version")), rng.randbytes(50), 0))
    return zipped(inside)


def set_member_field(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A field of a local header, of the directory or of its end, becomes another number."""
    offsets = {  # of the fields: version, flags, method, checksum, sizes, lengths, offsets
        b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
        b"PK\x01\x02": ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)),
        b"PK\x05\x06": ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    }
    mark = rng.choice(list(offsets))
    places = [at for at in range(len(content)) if content.startswith(mark, at)] if len(content) < 1 << 16 else []
    if not places:
        return flip_bits(rng, content, seeds)
    offset, width = rng.choice(offsets[mark])
    at = rng.choice(places) + offset
    before = int.from_bytes(content[at : at + width], "little")
    value = rng.choice((before + 1, before * 1000, rng.choice(EXTREMES), rng.randrange(20))) % (1 << (8 * width))
    return content[:at] + value.to_bytes(width, "little") + content[at + width :]


def bomb_member(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A member becomes, or is followed by, many zeros that take nearly no room."""
    inside = members(content) or [("cls.npy", b"", 0)]
    at = rng.randrange(len(inside))
    zeros = rng.choice((b"", inside[at][1])) + bytes(rng.choice((1 << 20, 1 << 23, 24 << 20)))
    inside[at] = (inside[at][0], zeros, zipfile.ZIP_DEFLATED)
    return zipped(inside)


# A bomb takes a while to be made: one in fifty.
ZIP = (*(mix_members, set_member_field) * 10, *BYTES * 3, bomb_member)

# Arrays


def npy_header(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """The header of an .npy file says something else: shape, type, order, keys, length."""
    shape = rng.choice(
        ("(3,)", "()", "(-1,)", "(0,)", "(2**60,)", f"({2**62}, 4)", "(1e3,)", "(True,)", "((),)", "3", f"({2**31},)")
    )
    types = ("'<f4'", "'|O'", "'O'", "'<f2'", "'>f8'", "'<c8'", "'|b1'", "'<U9'", "'<M8[s]'", "'V7'", "[('a', '<f4')]")
    dtype = rng.choice((*types, "None", "''", "'<f99'", "'<i4,<i4'", f"'|S{2**31 - 1}'", "'('", "[]", "{}"))
    order = rng.choice(("False", "True", "0", "None", "'no'"))
    text = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text = rng.choice((text, text, text, text.replace("shape", "form"), "(" * 300, "[" * 9000, "{}", "a" * 70000))
    header = text.encode("latin-1") + b"\n"
    version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (0, 9)))
    length = struct.pack(
        "<H" if version[0] == 1 else "<I", max(0, min(len(header) + rng.choice((0, 0, 0, -9, 9)), 65535))
    )
    return b"\x93NUMPY" + bytes(version) + length + header + content[-24:]


def npy_in_zip(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    inside = members(content)
    if not inside:
        return flip_bits(rng, content, seeds)
    at = rng.randrange(len(inside))
    name, part, compression = inside[at]
    inside[at] = (name, npy_header(rng, part, seeds), compression)
    return zipped(inside)


NPZ = (npy_in_zip, npy_in_zip, *ZIP)

# Safetensors


def safetensors_header(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """The JSON in front of the tensors says something else: offsets, shapes, types, names; or is no tree at all."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    try:
        tree = json.loads(header)
    except (ValueError, RecursionError):
        return flip_bits(rng, content, seeds)
    kind = rng.randrange(6)
    if kind == 0 and isinstance(tree, dict) and tree:
        entry = tree[rng.choice(list(tree))]
        if isinstance(entry, dict):
            numbers = (0, 1, -1, 4, len(data), len(data) + 1, 2**63, 2**64, 1.5)
            entry["data_offsets"] = [rng.choice(numbers), rng.choice(numbers)]
            entry["dtype"] = rng.choice(("F32", "F32", "BF16", "F8_E4M3", "F4", "I64", "BOOL", "C64", "X", ""))
            entry["shape"] = rng.choice(([], [0], [-1], [2**32, 2**32], [1] * 80, [0, 2**63], entry.get("shape")))
    elif kind == 1:
        return struct.pack("<Q", rng.choice((*EXTREMES, length + 1, length - 1)) % 2**64) + content[8:]
    elif kind == 2:
        header = nest(rng, header, seeds)
        return struct.pack("<Q", len(header)) + header + data
    else:
        tree = mutate_tree(rng, tree)
    header = json.dumps(tree).encode("utf-8", "replace")
    return struct.pack("<Q", len(header)) + header + data


SAFETENSORS = (safetensors_header, safetensors_header, safetensors_header, *BYTES)

# Pickles

GLOBALS = (
    *("os system", "posix system", "nt system", "builtins eval", "builtins exec", "builtins bytearray", "builtins set"),
    *("builtins getattr", "builtins complex", "__builtin__ bytearray", "subprocess Popen", "argparse Namespace"),
    *(
        "collections OrderedDict",
        "collections Counter",
        "torch Tensor",
        "torch FloatStorage",
        "torch.storage TypedStorage",
    ),
    *(
        "torch.storage UntypedStorage",
        "torch Size",
        "torch device",
        "torch float32",
        "torch LongStorage",
        "torch FloatTensor",
    ),
    *("torch.nn.parameter Parameter", "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v3"),
    *("torch._utils _rebuild_parameter", "torch._utils _rebuild_qtensor", "torch._utils _rebuild_sparse_tensor"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._tensor _rebuild_from_type_v2", "_codecs encode"),
    *("torch._utils _rebuild_wrapper_subclass", "torch._utils _rebuild_device_tensor_from_numpy", "numpy dtype"),
)
CODES = [code.code.encode("latin-1") for code in pickletools.opcodes]


def opcodes(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """An operation of a pickle is left out, moved, doubled, given another argument, or followed by another one."""
    try:
        ends = [position for _, _, position in pickletools.genops(content) if position is not None]
    except Exception:  # whatever a mutation before this one has broken
        return flip_bits(rng, content, seeds)
    stop = ends[-1]
    operations = [content[a:b] for a, b in zip(ends, [*ends[1:], stop + 1], strict=True)]
    at = rng.randrange(len(operations))
    number = rng.choice((*EXTREMES[:11], rng.randrange(4096)))
    big = struct.pack("<I", number)
    kind = rng.randrange(7)
    if kind == 0:
        del operations[at]
    elif kind == 1:
        operations.insert(at, rng.choice(operations))
    elif kind == 2:
        operations[at] = rng.choice(CODES) + rng.choice((b"", b"\x00", big))
    elif kind == 3:
        named = [n for n, operation in enumerate(operations) if operation.startswith(b"c")]
        name = rng.choice(GLOBALS).replace(" ", "\n").encode()
        operations[rng.choice(named or [at])] = b"c" + name + b"\n"
    elif kind == 4:
        counted = [n for n, operation in enumerate(operations) if operation[:1] in b"KMJ"]
        operations[rng.choice(counted or [at])] = b"J" + big
    elif kind == 5:
        call = b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n(J" + big + b"tR"
        operations.insert(at, call + rng.choice((b"", b"0", b"Q", b"b", b"\x81")))
    else:
        operations.insert(at, rng.choice((b"(" * 5000, b"]" * 20000, b"]\x94" * 300, b"\x8a\xff" + b"\x7f" * 255)))
    return b"".join(operations) + content[stop + 1 :]


def opcodes_in_zip(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    inside = members(content)
    found = [n for n, member in enumerate(inside or []) if member[0].endswith("data.pkl")]
    if not inside or not found:
        return flip_bits(rng, content, seeds)
    name, part, compression = inside[found[0]]
    inside[found[0]] = (name, opcodes(rng, part, [part]), compression)
    return zipped(inside)


def opcodes_of_legacy(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """One of the five pickles in front of the storages of a file as PyTorch wrote it before 1.6."""
    starts, stream = [], io.BytesIO(content)
    try:
        for _ in range(5):
            starts.append(stream.tell())
            for _ in pickletools.genops(stream):
                pass
    except Exception:  # as above
        return flip_bits(rng, content, seeds)
    at = starts[rng.choice((0, 1, 2, 3, 3, 3, 4))]
    return content[:at] + opcodes(rng, content[at:], seeds)


def odd_tensor(rng: random.Random, like: Any) -> Any:
    """A tensor of another shape, type or kind in the place of one; else `odd_value`."""
    if not isinstance(like, torch.Tensor) or rng.random() < 0.3:
        return odd_value(rng, None if isinstance(like, torch.Tensor) else like)
    flat = like.detach().flatten()
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: flat,
        lambda: flat[:0],
        lambda: like.detach().to(rng.choice((torch.float16, torch.int8, torch.bool, torch.complex64, torch.float64))),
        lambda: torch.zeros(()).expand(like.shape),
        lambda: torch.zeros(1).expand(1, 10**4 + 1, 10**5),
        lambda: like.detach().to("meta"),
        lambda: like.detach().float().to_sparse(),
        lambda: torch.quantize_per_tensor(flat.float(), 0.1, 0, torch.qint8),
        lambda: torch.full_like(like, float("nan")) if like.is_floating_point() else -like.detach(),
        lambda: torch.nn.Parameter(like.detach().float()),
        lambda: like.detach().unsqueeze(0),
        lambda: like.detach().repeat(3, *[1] * (like.dim() - 1)) if like.dim() else like,
    )
    return rng.choice(kinds)()


def torch_tree(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A place of what a file of PyTorch holds becomes something else, and the file is whole."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            tree = torch.load(io.BytesIO(content), weights_only=True)
        config = tree.get("config") if isinstance(tree, dict) else None
        if isinstance(config, Namespace) and rng.random() < 0.5:
            mutate_tree(rng, vars(config), odd_tensor)
        else:
            tree = mutate_tree(rng, tree, odd_tensor)
        buffer = io.BytesIO()
        torch.save(tree, buffer, _use_new_zipfile_serialization=rng.random() < 0.8)
    except Exception:  # as above
        return flip_bits(rng, content, seeds)
    return buffer.getvalue()


TORCH = (*(torch_tree,) * 40, *(opcodes_in_zip,) * 20, *(opcodes_of_legacy,) * 8, *ZIP)
