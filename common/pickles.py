"""PyTorch's files from anywhere: what they hold is looked at before anything is unpickled or memory is taken.

`torch.load(weights_only=True)` runs no code, but a few bytes can make it take any amount of memory (a bytearray of a
billion zeros, a compressed member, a storage under many names) or hash a key for ever. Here the pickle is gone through
first with inert stand-ins, and only what a state_dict, an optimizer's state and their settings are made of is let
through: PyTorch writes nothing else into them.
"""

import io
import itertools
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn

import torch

HARMLESS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "Size"),
    ("torch", "device"),
}
# Bytes of a number, by the name that a pickle has for its type.
STORAGES = {"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "BoolStorage": 1}
STORAGES |= {"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1}
# All that torch.load(weights_only=True) understands but EMPTY_SET. Others take memory for bytes that a file does not
# have (BYTEARRAY8), or hash what they are given (DICT, ADDITEMS, FROZENSET).
OPERATIONS = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1),
    *(pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.SETITEM, pickle.SETITEMS, pickle.GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID),
)
LEGACY_PICKLES = 5  # of a file as PyTorch wrote it before 1.6: mark, version, system, content, order of the storages


class Refused(Exception):
    """A pickled object that is none of those let through; the argument names it."""


def load(path: Path, namespace: bool = False) -> Any:
    """The content of a PyTorch file, on the CPU; an `argparse.Namespace` inside is let through where `namespace` is.

    Raises Refused for any other pickled object, of which nothing is executed, and nearly anything for damaged bytes.
    """
    _inspect(path, HARMLESS | ({("argparse", "Namespace")} if namespace else set()))
    with torch.serialization.safe_globals([Namespace] if namespace else []):
        return torch.load(path, map_location="cpu", weights_only=True)


def _inspect(path: Path, known: set[tuple[str, str]]) -> None:
    """Raise unless the pickles in the file hold what is `known`, and storages no larger than the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise ValueError("it is compressed, which PyTorch's files never are")
                names = [member for member in members if re.fullmatch(r"[^/]*/data\.pkl", member.filename)]
                if len(names) != 1 or sum(member.file_size for member in members) > size:
                    raise ValueError("its directory does not fit what it holds")
                total = _Inspector(io.BytesIO(archive.read(names[0])), known).load_storages()
        else:
            file.seek(0)
            inspectors = [_Inspector(file, known) for _ in range(LEGACY_PICKLES)]
            total = sum(inspector.load_storages() for inspector in inspectors)
    if total > size:
        raise ValueError(f"its tensors need {total} bytes, and it has {size}")


class _Inert:
    """Stands for whatever a pickle makes, and takes what it is made from."""

    def __init__(self, *_: Any) -> None: ...


class _Filled:
    """Stands for an OrderedDict or a Namespace, which PyTorch pickles empty and then fills."""

    def __setitem__(self, *_: Any) -> None: ...


_PYTHONS: dict[int, Any] = pickle._Unpickler.dispatch  # what does each operation, by its byte


class _Operations(dict[int, Callable[[Any], None]]):
    """The same for those let through; refuses the others."""

    def __missing__(self, byte: int) -> NoReturn:
        raise ValueError(f"it has the pickle operation {bytes([byte])!r}, which torch.save does not use")


# Python's own unpickler in Python: the one in C takes memory for numbers of the memo that a file makes up.
class _Inspector(pickle._Unpickler):
    """Goes through one pickle without making any of its objects."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = _Operations((byte, _PYTHONS[byte]) for (byte,) in OPERATIONS)
    stack: list[Any]

    def __init__(self, file: IO[bytes], known: set[tuple[str, str]]) -> None:
        super().__init__(file, encoding="utf-8")
        self.known = known
        self.storages: dict[str, int] = {}  # bytes by key

    def load_storages(self) -> int:
        """Go through the pickle; return the bytes of its storages."""
        self.load()
        return sum(self.storages.values())

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in self.known:
            raise Refused(f"{module}.{name}")
        return _Filled if name in ("OrderedDict", "Namespace") else _Inert

    def persistent_load(self, pid: Any) -> _Inert:
        kind, itemsize, key, _, numel, *_ = pid
        if kind != "storage" or type(key) is not str or type(itemsize) is not int or type(numel) is not int:
            raise ValueError("it has no such storage")
        if numel < 0 or "\0" in key:
            raise ValueError("it has a storage of no size or name")
        self.storages[key] = max(self.storages.get(key, 0), numel * itemsize)
        return _Inert()

    def _check_keys(self, keys: Any) -> None:
        # A tuple of tuples that share their parts takes for ever to be hashed.
        if not all(type(key) in (str, int, float, bool, type(None)) for key in keys):
            raise ValueError("it has a key that is neither text nor number")

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        _PYTHONS[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        self._check_keys(itertools.islice(self.stack, 0, None, 2))
        _PYTHONS[pickle.SETITEMS[0]](self)

    def load_build(self) -> None:
        # Python's would set attributes of anything, a class too; PyTorch's would make a tensor anew.
        state = self.stack.pop()
        if type(state) is not dict or type(self.stack[-1]) is not _Filled:
            raise ValueError("it has a state of something that PyTorch gives none")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build
