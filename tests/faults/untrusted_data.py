"""Data sets and images from anywhere: read, or refused in one sentence.

The files of small data sets in their real layouts are damaged, one at a time. A file that is fuzzed begins with a line
that says of which data set it is, and which file there; what follows is put in that place and the data set is read.
"""

import importlib.util
import json
import os
import pickle
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from common.data import images
from common.data.demo import MARKER
from common.data.demo_layouts import DEMO_FORMAT
from common.data.published import DATA_SETS
from common.data.readers import READERS
from faults import image_kinds
from faults.cases import COMMON, GLSIM, Case
from faults.fuzz import Mutator, Target, cases_of, kept
from faults.fuzz_bytes import BYTES, JSON, TEXT, flip_bits
from faults.image_kinds import chunk, encoded

SECTION = "Untrusted files and command lines"

ABOUT = f"""{image_kinds.about()}
Memory is bounded by the file's size but for images, whose pixels are what is bounded: a file of one colour may well be
a thousandth of them. The largest that is read takes 512 MiB with an alpha channel and 764 MiB in 16-bit grey. A
compressed MATLAB variable may unpack to 12 MiB. Files that are made of nothing but brackets, or of lines of three
characters, become 26 (JSON) and 46 (lists) times their size as Python's objects; the fuzzed files, of some KB, stay
inside the allowance of 16 MiB.
"""

# Data sets


class _Tree:
    """A data set on disk, of which one file at a time is replaced."""

    def __init__(self, root: Path, read: Callable[[Path], object]) -> None:
        self.root, self.read = root, read
        self.files = {
            file.relative_to(root).as_posix(): file.read_bytes()
            for file in sorted(root.rglob("*"))
            if file.suffix in (".txt", ".json", ".mat", ".csv", ".pickle")
        }

    def check(self, relative: str, content: bytes) -> None:
        """Reads the data set with this content in the file's place."""
        try:
            (self.root / relative).write_bytes(content)
            self.read(self.root)
        finally:
            (self.root / relative).write_bytes(self.files[relative])


def _module(path: str) -> Any:
    """A file of the tests that is no module of a package here: their folders have names of the product's packages."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).parents[1] / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read_common(name: str, root: Path) -> None:
    for split in DATA_SETS[name].counts:
        assert len(READERS[name](root, split)) > 0


@cache
def _common(name: str) -> _Tree:
    root = kept() / name
    tiny, ffvt = _module("data/tiny_trees.py"), _module("data/ffvt_trees.py")
    writers = {"food101": tiny.write_food, "aircraft": tiny.write_aircraft, "coco": tiny.write_coco} | ffvt.WRITERS
    writers[name](root)
    for file in root.rglob("*2017.json"):
        _shrink(file)
    return _Tree(root, partial(_read_common, name))


def _shrink(file: Path) -> None:
    """iNaturalist's 5,089 categories down to those that have images, and a few."""
    content = json.loads(file.read_text())
    used = {entry["category_id"] for entry in content["annotations"]} | {0, 1, 2}
    content["categories"] = [category for category in content["categories"] if category["id"] in used]
    file.write_text(json.dumps(content))


@cache
def _coco_index() -> _Tree:
    """COCO with the index files that its reader has made; they hold as long as size and time of the annotations."""
    root = kept() / "coco-index"
    _module("data/tiny_trees.py").write_coco(root)
    for file in root.rglob("instances*.json"):
        os.utime(file, ns=(0, 0))
    _read_common("coco", root)
    tree = _Tree(root, partial(_read_common, "coco"))
    tree.files = {name: content for name, content in tree.files.items() if name.endswith(".index.json")}
    return tree


@cache
def _marker() -> _Tree:
    """Folders of the demo: whether they are finished is asked before they are read."""
    folder = kept() / "marker"
    (folder / "images").mkdir(parents=True)
    files = ("images.txt", "images/a.jpg", "images/b.jpg")
    for file in files:
        (folder / file).write_text("1 a.jpg\n")
    (folder / MARKER).write_text(json.dumps({"format": DEMO_FORMAT, "files": dict.fromkeys(files, 8)}))
    return _Tree(folder, _is_finished)


def _is_finished(folder: Path) -> None:
    from common.data.demo import is_finished
    from common.errors import UserError

    if not is_finished(folder):
        raise UserError("not finished")


@cache
def _cifar(name: str) -> _Tree:
    """Two images a file, and the marker of the demo: without it the MD5 is compared first."""
    root = kept() / name
    folder = root / DATA_SETS[name].folder
    source: Any = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}[name]
    module = importlib.import_module("torchvision.datasets")
    source = getattr(module, source)
    key = source.meta["key"]
    folder.mkdir(parents=True)
    content: dict[str, Any] = {source.meta["filename"]: {key: ["cat", "dog", "eel"]}}
    for file, _ in [*source.train_list, *source.test_list]:
        data = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
        content[file] = {"batch_label": "a", "data": data, key.replace("label_names", "labels"): [0, 2]}
    for file, values in content.items():
        (folder / file).write_bytes(pickle.dumps(values, protocol=4))
    tree = _Tree(root, partial(_read_cifar, name))
    tree.files = {file.relative_to(root).as_posix(): file.read_bytes() for file in folder.iterdir()}
    return tree


def _read_cifar(name: str, root: Path) -> None:
    folder = root / DATA_SETS[name].folder
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != MARKER}
    (folder / MARKER).write_text(json.dumps({"format": DEMO_FORMAT, "files": sizes}))
    _read_common(name, root)


@cache
def _glsim(name: str) -> _Tree:
    from glsim.data_utils.annotations import read_annotations
    from glsim.data_utils.splits import settings_of

    root = kept() / f"glsim-{name}"
    _module("glsim/annotation_trees.py").write_recorded(name, root)
    for file in root.rglob("*2017.json"):
        _shrink(file)
    return _Tree(root, partial(read_annotations, name, images=settings_of(name).folder_train))


@cache
def _lists() -> _Tree:
    """csv files as GLSim's programs read them."""
    root = kept() / "lists"
    names = {0: "cat", 1: "dog, small", 2: "eel"}
    for class_id in names:
        (root / f"images/{class_id}").mkdir(parents=True)
        for image in "abcd":
            (root / f"images/{class_id}/{image} 1.jpg").touch()

    def rows(letters: str) -> str:
        return "class_id,dir\n" + "".join(f"{id_},{id_}/{image} 1.jpg\n" for id_ in names for image in letters)

    for file, letters in (("train_val", "abc"), ("train", "ab"), ("val", "c"), ("test", "d")):
        (root / f"{file}.csv").write_text(rows(letters))
    lines = "".join(f'{class_id},"{name}"\n' for class_id, name in names.items())
    (root / "classid_classname.csv").write_text(f"class_id,class_name\n{lines}")
    return _Tree(root, _read_lists)


def _read_lists(root: Path) -> None:
    from glsim.data_utils.datasets import read

    settings = _settings(root)
    read(settings)
    read(replace(settings, train_trainval=False))


@cache
def _settings(root: Path) -> Any:
    from glsim.train_utils.settings import Settings

    return Settings(dataset_root_path=str(root))


# Targets: a name of a data set -> its tree

_TREES: dict[str, Callable[[], _Tree]] = {
    **{name: partial(_common, name) for name in READERS if not name.startswith("cifar")},
    **{name: partial(_cifar, name) for name in ("cifar10", "cifar100")},
    "index": _coco_index,
    "marker": _marker,
    "lists": _lists,
    **{
        f"glsim-{name}": partial(_glsim, name)
        for name in ("aircraft", "cars", "cub", "dogs", "flowers", "food", "inat17", "nabirds", "pets")
    },
}


def seeds_of(names: Sequence[str], suffix: str, folder: Path) -> list[bytes]:
    trees = {name: _TREES[name]() for name in names}
    return [
        f"{name} {relative}\n".encode() + content
        for name, tree in trees.items()
        for relative, content in tree.files.items()
        if relative.endswith(suffix)
    ]


def read_in_place(path: Path) -> None:
    head, _, content = path.read_bytes().partition(b"\n")
    name, _, relative = head.decode().partition(" ")
    if name == "coco":
        for index in (_TREES[name]().root / "coco/annotations").glob("*.index.json"):
            index.unlink()
    elif name == "index":
        _keep_time(_TREES[name]().root)
    _TREES[name]().check(relative, content)


def _keep_time(root: Path) -> None:
    for file in root.rglob("instances_???*2017.json"):
        os.utime(file, ns=(0, 0))


def mutate_behind_line(
    mutators: tuple[Mutator, ...], rng: random.Random, content: bytes, seeds: Sequence[bytes]
) -> bytes:
    """The first line stays."""
    head, _, content = content.partition(b"\n")
    bodies = [seed.partition(b"\n")[2] for seed in seeds]
    return head + b"\n" + rng.choice(mutators)(rng, content, bodies)


def _behind_line(*mutators: Mutator) -> tuple[Mutator, ...]:
    return (partial(mutate_behind_line, mutators),)


# MATLAB files


def in_variable(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A variable is changed before it is compressed; now and then it is followed by very many zeros."""
    at, places = 128, []
    while at + 8 <= len(content):
        kind, size = struct.unpack("<II", content[at : at + 8])
        places.append((at, kind, size))
        at += 8 + size
    if not places:
        return flip_bits(rng, content, seeds)
    at, kind, size = rng.choice(places)
    inside = content[at + 8 : at + 8 + size]
    if kind == 15:
        try:
            inside = zlib.decompress(inside)
        except zlib.error:  # a mutation before this one has damaged it
            return flip_bits(rng, content, seeds)
        inside = rng.choice(_VARIABLE)(rng, inside, [inside])
        inside += bytes(rng.choice((1 << 20, 40 << 20))) if rng.random() < 0.02 else b""
        inside = zlib.compress(inside, 1)
    else:
        inside = rng.choice(_VARIABLE)(rng, inside, [inside])
    size = rng.choice((len(inside), len(inside), len(inside), size))
    return content[:at] + struct.pack("<II", kind, size) + inside + content[at + 8 + places[0][2] :]


def set_word(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """One of the numbers at multiples of 4 becomes another: a type, a size, a dimension, a class."""
    at = 4 * rng.randrange(max(1, len(content) // 4))
    value = rng.choice((*range(20), 0x10001, 0x40001, 0x50002, 2**31 - 1, 2**31, 2**32 - 1, len(content)))
    return content[:at] + struct.pack("<I", value) + content[at + 4 :]


_VARIABLE: tuple[Mutator, ...] = (set_word, set_word, set_word, *BYTES)
MAT: tuple[Mutator, ...] = (in_variable, in_variable, in_variable, in_variable, *BYTES)

# Images


def _picture(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def image_seeds(folder: Path) -> list[bytes]:
    levels = Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 300)
    frames: dict[str, Any] = {"save_all": True, "append_images": [_picture("RGB")]}
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    forms: list[tuple[str, Image.Image, dict[str, Any]]] = [
        *(
            ("JPEG", _picture("RGB"), options)
            for options in ({}, {"progressive": True}, {"exif": exif, "dpi": (72, 72)})
        ),
        *(("JPEG", _picture(mode), {}) for mode in ("L", "CMYK")),
        *(("PNG", _picture(mode), {}) for mode in ("1", "L", "LA", "RGB", "RGBA")),
        ("PNG", _picture("P"), {"transparency": 3}),
        ("PNG", levels, {}),
        ("PNG", _picture("RGB"), {"exif": exif, "icc_profile": b"profile" * 30} | frames),
        *(("GIF", _picture("P"), options) for options in ({}, frames, {"interlace": 0, "transparency": 3})),
        *(("BMP", _picture(mode), {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(("PPM", _picture(mode), {}) for mode in ("1", "L", "RGB")),
        *(("TIFF", _picture("RGB"), {"compression": f"tiff_{name}"}) for name in ("lzw", "deflate", "adobe_deflate")),
        *(("TIFF", _picture("RGB"), {"compression": name}) for name in ("raw", "packbits", "jpeg")),
        *(("TIFF", _picture("1"), {"compression": name}) for name in ("group3", "group4")),
        *(("TIFF", picture, {}) for picture in (levels, _picture("CMYK"), _picture("P"), _picture("LA"))),
        ("TIFF", _picture("RGB"), frames | {"exif": exif}),
        *(("WEBP", _picture("RGBA"), options) for options in ({}, {"lossless": True}, frames, {"exif": exif})),
        ("MPO", _picture("RGB"), frames),
    ]
    return [encoded(form, picture, **options) for form, picture, options in forms]


def read_image(path: Path) -> None:
    # So few pixels that they may be beside the allowance: what a bomb may take is bounded by this alone.
    with mock.patch.object(images, "MAX_PIXELS", 2**20):
        assert images.load_image(path).mode == "RGB"


def in_png(rng: random.Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    """A chunk of a PNG is changed, and its checksum is right again."""
    if not content.startswith(b"\x89PNG"):
        return flip_bits(rng, content, seeds)
    chunks, at = [], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return flip_bits(rng, content, seeds)
    place = rng.randrange(len(chunks))
    name, data = chunks[place]
    kind = rng.randrange(6)
    if kind == 0:
        del chunks[place]
    elif kind == 1:
        chunks.insert(rng.randrange(len(chunks)), (name, data))
    elif kind == 2 and name == b"IDAT":
        try:
            rows = zlib.decompress(data)
        except zlib.error:  # a mutation before this one has damaged it
            return flip_bits(rng, content, seeds)
        chunks[place] = (
            name,
            zlib.compress(rng.choice((rows + bytes(1 << 20), rows[:-1], rng.choice(BYTES)(rng, rows, [rows])))),
        )
    elif kind == 3:
        odd = rng.choice(
            (b"zTXta\0\0", b"iCCPa\0\0", b"iTXta\0\1\0\0\0", b"tEXt", b"eXIf", b"tRNS", b"PLTE", b"fdAT\0\0\0\1")
        )
        filling = rng.choice((zlib.compress(bytes(2 << 20), 1), rng.randbytes(9), b"", bytes(800)))
        chunks.insert(rng.randrange(len(chunks) + 1), (odd[:4], odd[4:] + filling))
    else:
        chunks[place] = (name, rng.choice(BYTES)(rng, data, [data]))
    return content[:8] + b"".join(chunk(name, data) for name, data in chunks)


IMAGES: tuple[Mutator, ...] = (in_png, in_png, *BYTES)

# Folders of images


def name_seeds(folder: Path) -> list[bytes]:
    return [
        "cat/a.jpg\ncat/b.png\ndog/c d.jpeg\ndog/ä.JPG\neel/x/y.webp".encode(),
        b"1_1_train.png\n1_2_test.png\n2_1_train.png\n2_2_test.png",
    ]


def _folder_of(path: Path) -> Path:
    """A folder of empty files with the names that the file lists, as far as there can be such names."""
    folder = path.with_suffix(".folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for line in path.read_bytes().split(b"\n")[:30]:
        name = os.path.join(os.fsencode(folder), line)
        if line.startswith(b"/") or b".." in line.split(b"/"):
            continue
        try:
            os.makedirs(os.path.dirname(name), exist_ok=True)
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
        except (OSError, ValueError):  # no file system has such a name
            continue
    return folder


def read_class_folders(path: Path) -> None:
    """As GLSim's preparation does, with lists that are read again."""
    from common.errors import UserError
    from glsim.data_utils.annotations import Source, _leaves
    from glsim.data_utils.datasets import read_list, read_names
    from glsim.data_utils.splits import image_folder, write_names, write_rows

    folder = _folder_of(path)
    try:
        _leaves(Source("cotton", folder, "."))
    except UserError:
        rows, names = image_folder(folder)
        write_rows(folder / "train_val.csv", rows)
        write_names(folder / "names.csv", names)
        listed = read_list(folder / "train_val.csv")
        assert [*zip(listed.labels, listed.images, strict=True)] == rows
        assert read_names(folder / "names.csv") == names


def listing_seeds(folder: Path) -> list[bytes]:
    return [content for name, content in _lists().files.items() if name != "classid_classname.csv"]


def read_listing(path: Path) -> None:
    """A list that GLSim's inference is given."""
    from glsim.tools.inference import find

    assert find(str(path), _settings(_lists().root))


_GLSIM_TEXT = ("glsim-aircraft", "glsim-cub", "glsim-nabirds", "glsim-pets")
_TEXT = ("air", "aircraft", "cotton", "cub", "soyloc")

TARGETS = [
    Target("images of 8 formats", COMMON, image_seeds, read_image, IMAGES, ".jpg", weight=6),
    Target(
        "lists of CUB, Aircraft, Cotton80, SoyLocal",
        COMMON,
        partial(seeds_of, _TEXT, ".txt"),
        read_in_place,
        _behind_line(*TEXT),
        weight=3,
    ),
    Target(
        "annotations of COCO, iNaturalist, Food-101",
        COMMON,
        partial(seeds_of, ("coco", "inat2017", "food101"), ""),
        read_in_place,
        _behind_line(*JSON),
        weight=3,
    ),
    Target("index of COCO", COMMON, partial(seeds_of, ("index",), ""), read_in_place, _behind_line(*JSON)),
    Target(
        "marker of the demo data", COMMON, partial(seeds_of, ("marker",), ".json"), read_in_place, _behind_line(*JSON)
    ),
    Target(
        "MATLAB lists of Cars, Dogs",
        COMMON,
        partial(seeds_of, ("car", "dog"), ".mat"),
        read_in_place,
        _behind_line(*MAT),
        weight=3,
    ),
    Target(
        "pickles of CIFAR",
        COMMON,
        partial(seeds_of, ("cifar10", "cifar100"), ""),
        read_in_place,
        _behind_line(*BYTES),
        weight=2,
    ),
    Target(
        "csv lists and class names",
        GLSIM,
        partial(seeds_of, ("lists",), ".csv"),
        read_in_place,
        _behind_line(*TEXT),
        weight=3,
    ),
    Target("csv list of --images_path", GLSIM, listing_seeds, read_listing, TEXT, ".csv"),
    Target(
        "lists of CUB, NABirds, Aircraft, Pets",
        GLSIM,
        partial(seeds_of, _GLSIM_TEXT, ".txt"),
        read_in_place,
        _behind_line(*TEXT),
        weight=2,
    ),
    Target(
        "annotations of iNaturalist, Food-101",
        GLSIM,
        partial(seeds_of, ("glsim-inat17", "glsim-food"), ".json"),
        read_in_place,
        _behind_line(*JSON),
    ),
    Target(
        "MATLAB lists of Cars, Dogs, Flowers",
        GLSIM,
        partial(seeds_of, ("glsim-cars", "glsim-dogs", "glsim-flowers"), ".mat"),
        read_in_place,
        _behind_line(*MAT),
    ),
    Target("names of files in folders of images", GLSIM, name_seeds, read_class_folders, TEXT),
]


def check_kinds(folder: Path) -> int:
    for number, kind in enumerate(image_kinds.KINDS):
        (folder / str(number)).mkdir()
        kind.check(folder / str(number))
    return len(image_kinds.KINDS)


def cases() -> list[Case]:
    kinds = f"images of {len(image_kinds.KINDS)} odd kinds, made by hand"
    return [
        Case(SECTION, kinds, COMMON, "what the table below says becomes of them", "", check_kinds),
        *cases_of(SECTION, TARGETS, quick=130, full=2000),
    ]
