"""A data set once more, with its images resized already: decoding and resizing cost most of a run's time on the CPU.

The pixels are those that a run computes from the original images, to the bit: PNG loses nothing, and to resize an image
to the size that it has changes nothing.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool  # Pillow decodes and resizes without the interpreter's lock
from pathlib import Path

from torchvision import transforms as T
from tqdm import tqdm

from common.data.dataset_folder import DatasetFolder
from common.data.images import Data, Images, load_image
from common.errors import UserError
from common.files import write_atomically, write_text

MARKER = "resized.json"
LISTS = (".json", ".mat", ".txt")  # what readers take beside images


def resize(folder: DatasetFolder, splits: Sequence[Images], transform: T.Resize, to: str | Path) -> Path:
    """Writes the data set of `splits` below the data root `to`; returns its folder there.

    The images, of PNG content, keep their names: decoders go by content. Lists come last, so that no run takes an
    unfinished folder; what an interrupted call has written already is kept.

    Raises:
        UserError: an image cannot be decoded; or another data set is there.
    """
    target = Path(to).expanduser() / folder.path.relative_to(folder.root)
    marker = json.dumps(_described(transform))
    if target.exists() and (not (target / MARKER).exists() or (target / MARKER).read_text() != marker):
        raise UserError(f"{target} holds other images than those asked for: name another folder with --to")
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / MARKER, marker)
    paths = {path: target / path.relative_to(folder.path) for images in splits for path in images.paths}
    for place in {file.parent for file in paths.values()}:
        place.mkdir(parents=True, exist_ok=True)
    with ThreadPool() as pool:
        done = pool.imap_unordered(partial(_resize_one, transform), paths.items())
        for _ in tqdm(done, total=len(paths), unit=" images"):
            pass
    for file in sorted(folder.path.rglob("*")):
        if file.suffix in LISTS and file.is_file():
            copy = target / file.relative_to(folder.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
    return target


def _resize_one(transform: T.Resize, paths: tuple[Path, Path]) -> None:
    source, target = paths
    if not target.exists():
        image = transform(load_image(source))
        write_atomically(target, lambda file: image.save(file, "PNG", compress_level=1))


def _described(transform: T.Resize) -> dict[str, object]:
    size = transform.size if isinstance(transform.size, int) else list(transform.size)
    return {"size": size, "interpolation": transform.interpolation.value}


def check_resized(data: Data) -> None:
    """Raises UserError where images were written by `resize` and a transform does not begin with that very resize."""
    for images in (data.train, data.val, data.test):
        for folder in images.path(0).parents:
            with suppress(FileNotFoundError, NotADirectoryError):
                marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
                first = getattr(images.transform, "transforms", [None])[0]
                if not isinstance(first, T.Resize) or _described(first) != marker:
                    raise UserError(
                        f"{folder} has images resized to {marker['size']} ({marker['interpolation']}), but this run "
                        f"begins with {first}: name the original images with --data-root, or resize these to that size"
                    )
                break
