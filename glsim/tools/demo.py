"""Demo page: a picture in; its classes, the crop and a map of what the model looks at out. In the browser, by Gradio.

    pip install 'gradio>=6.31'
    python tools/demo.py [--ckpt_path ckpts/cub_glsim_224.pth ...] [--examples samples/] [--port 7860]
    python tools/demo.py --demo       digits, and a small model whose weights are random

The page is for this machine alone unless --host says otherwise. A visitor chooses among the checkpoints and the
examples given here, by name, and sends pictures of up to 10 MB, which are deleted within the hour and at the end.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

if __name__ == "__main__":  # as the README starts it, inside glsim/: the modules lie beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sklearn.datasets
from PIL import Image
from torch import Tensor, nn

from common.data.images import BadImage, load_image
from common.errors import UserError
from common.predict import find_images
from common.train import distributed
from common.train.precision import Precision
from glsim.data_utils.datasets import read
from glsim.data_utils.transforms import mean_std
from glsim.model_utils.build import top_patches
from glsim.model_utils.glsim import GLSimBase, ViTGLSim
from glsim.tools.heatmap import MASKS, masks_of
from glsim.train_utils.pictures import overlay, to_picture
from glsim.train_utils.settings import Settings
from glsim.train_utils.trained import Running, Trained, load_trained, not_trained, settings_given
from glsim.train_utils.yaml_config import CONFIGS, read_config

MAX_UPLOAD = 10 * 2**20  # bytes a picture
TOP_CLASSES = 5
EXAMPLES = 12  # shown at most
KEPT = 4  # checkpoints in memory
VIEW = 448  # pixels, side of crop and map on the page
NO_MASK = "none"


def find_checkpoints(given: Sequence[str]) -> dict[str, Path]:
    """Return the checkpoints, folders of runs among them, by `folder/name`; of none, the .pth files of ckpts/.

    Raises UserError where there is none, and where two have one name.
    """
    paths = [Path(path) for path in given] or sorted(Path("ckpts").glob("*.pth"))
    found = {f"{path.resolve().parent.name}/{path.resolve().stem}": path for path in paths}
    if not paths:
        raise UserError("ckpts/ holds no .pth file: name checkpoints with --ckpt_path, or see the page with --demo")
    if len(found) < len(paths):
        raise UserError("--ckpt_path: two of the checkpoints have one name, and so have their folders: rename one")
    return found


def find_examples(folder: str | None) -> list[Path]:
    """Return the first EXAMPLES pictures of the folder; without one, the two photographs that scikit-learn has."""
    if folder is None:
        return [Path(name) for name in sklearn.datasets.load_sample_images().filenames]
    return find_images([folder])[:EXAMPLES]


def write_digits(folder: Path) -> tuple[Settings, list[Path]]:
    """Write digits to `folder`; return the settings of a small GLSim for them, and one picture a class."""
    method = read_config(CONFIGS / "methods" / "glsim.yaml")
    changes = settings_given(Settings(**method), Running(demo=True, output=str(folder)), {})
    settings = Settings(**(method | changes))
    test = read(settings).test
    return settings, [test.path(test.labels.index(label)) for label in range(len(test.classes))]


class Shown(NamedTuple):
    """What the page shows."""

    classes: dict[str, float]  # the TOP_CLASSES most probable ones, each with its probability
    crop: Image.Image | None  # as the model sees it; None of a model that makes none
    map: Image.Image  # the mask over what the model sees of the picture


class Looker:
    """Answers one question at a time, because the models are shared."""

    def __init__(self, load: Callable[[str], Trained]) -> None:
        self._load = lru_cache(maxsize=KEPT)(load)
        self._lock = Lock()

    def __call__(self, picture: Path, checkpoint: str, top: int, mask: str) -> Shown:
        """Raises UserError for a picture that cannot be read, and for a top or a mask that the model does not have."""
        with self._lock:
            trained = self._load(checkpoint)
            set_top(trained.model, top)
            images = trained.transform(load_image(picture))[None].to(trained.device)  # (1, 3, S, S)
            answer = trained.answer(images, TOP_CLASSES, Precision("fp32", trained.device))
            drawn = _picture(images, trained)
            if mask != NO_MASK:
                drawn = overlay(drawn, masks_of(trained.model, images, [mask])[mask][0])
        classes = {trained.classes[number]: probability for number, probability in answer.classes[0]}
        crop = None if answer.crops is None else _view(_picture(answer.crops, trained))
        return Shown(classes, crop, _view(drawn))

    def top(self, checkpoint: str) -> tuple[int, int]:
        """Return the patches that the crop of this model is drawn around, and how many there are; (1, 1) of no crop."""
        with self._lock:
            trained = self._load(checkpoint)
        if not (isinstance(trained.model, GLSimBase) and trained.settings.dynamic_anchor):
            return 1, 1
        return top_patches(trained.settings), trained.model.grid**2


def set_top(model: nn.Module, top: int) -> None:
    """Let GLSim draw its crop around `top` patches; UserError where there are not so many. Others draw none."""
    if not isinstance(model, GLSimBase):
        return
    patches = model.grid**2
    if not 1 <= top <= patches:
        raise UserError(f"this model cuts a picture into {patches} patches: choose 1 to {patches} of them")
    setattr(model, "config" if isinstance(model, ViTGLSim) else "options", replace(model.options, dynamic_top=top))


def _picture(images: Tensor, trained: Trained) -> Any:
    """The first of the images (B, 3, S, S) as an array of levels."""
    return to_picture(images[0], *mean_std(trained.settings))


def _view(picture: Any) -> Image.Image:
    return Image.fromarray(picture).resize((VIEW, VIEW))


def build_page(looker: Looker, checkpoints: Sequence[str], examples: Sequence[Path]) -> Any:
    """Return the Gradio page on which a visitor asks `looker` about a picture; UserError from loading a checkpoint."""
    import gradio

    def answer(picture: str | None, checkpoint: str, top: int, mask: str) -> Shown:
        if picture is None:
            raise gradio.Error("Choose a picture first.", print_exception=False)
        try:
            return looker(Path(picture), checkpoint, top, mask)
        except BadImage:  # it names a file that the visitor does not know
            raise gradio.Error("This file cannot be read as a picture.", print_exception=False) from None
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    def slider(checkpoint: str) -> Any:
        top, patches = tops[checkpoint]
        label = "Patches that the crop is drawn around"
        return gradio.Slider(1, patches, top, step=1, label=label, interactive=patches > 1)

    tops = {checkpoint: looker.top(checkpoint) for checkpoint in checkpoints}  # and so all of them can be loaded
    with gradio.Blocks(title="GLSim", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown("# GLSim\nWhat is in the picture, and where the model looks.")
        with gradio.Row():
            with gradio.Column():
                picture: Any = gradio.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], buttons=[], height=320
                )
                # Gradio would decode what was sent, or only named; load_image does, and says what is wrong with it.
                picture.preprocess = lambda sent: sent and sent.path
                gradio.Examples([[str(path)] for path in examples], picture, cache_examples=False)
                checkpoint = gradio.Dropdown(list(checkpoints), value=checkpoints[0], label="Checkpoint")
                top = slider(checkpoints[0])
                mask = gradio.Dropdown([*MASKS, NO_MASK], value=MASKS[0], label="Map")
                button = gradio.Button("Look", variant="primary")
            with gradio.Column():
                classes = gradio.Label(label="Classes")
                with gradio.Row():  # without Gradio's third button, which sends a picture to another site
                    crop = gradio.Image(
                        label="Crop",
                        elem_id="crop",
                        format="png",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                    )
                    drawn = gradio.Image(
                        label="Map", elem_id="map", format="png", interactive=False, buttons=["download", "fullscreen"]
                    )
        button.click(answer, [picture, checkpoint, top, mask], [classes, crop, drawn], api_visibility="private")
        checkpoint.change(slider, checkpoint, top, api_visibility="private")
    return page.queue(max_size=32)


def serve(page: Any, host: str, port: int) -> str:
    """Start the page in the background and return its address. Raises UserError where that is taken or not ours."""
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_UPLOAD,
            enable_monitoring=False,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: the page cannot listen there; choose another port") from error
    return str(page.local_url)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Show the page until it is interrupted. `folder` takes the demo's digits and the visitors' pictures."""
    # Before the import. Gradio serves all that is in its folder, and has a history of runs that other sites can hold.
    os.environ |= {"GRADIO_TEMP_DIR": str(folder / "visitors"), "GRADIO_RUN_HISTORY": "False"}
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError("the page needs Gradio: pip install 'gradio>=6.31'") from error
    device = distributed.choose_device(arguments.device, distributed.Launch())
    settings, examples = write_digits(folder) if arguments.demo else (None, [])
    if arguments.examples or settings is None:
        examples = find_examples(arguments.examples)
    if settings is not None and not arguments.ckpt_path:
        trained = not_trained(settings, device)
        checkpoints, looker = ["random weights"], Looker(lambda name: trained)
    else:
        paths = find_checkpoints(arguments.ckpt_path)
        checkpoints, looker = list(paths), Looker(lambda name: load_trained(paths[name], device))
    page = build_page(looker, checkpoints, examples)
    print(f"The page is at {serve(page, arguments.host, arguments.port)} until Ctrl-C.", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the folder is deleted then too
    page.block_thread()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 1 for an error of the user."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ckpt_path", nargs="+", default=[], metavar="F", help="checkpoints [ckpts/*.pth]")
    parser.add_argument("--examples", metavar="DIR", help="pictures to pick from [two photographs]")
    parser.add_argument("--host", default="127.0.0.1", metavar="S", help="0.0.0.0: for others too [%(default)s]")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="of the page [%(default)s]")
    parser.add_argument("--device", default="auto", metavar="S", help="auto, cpu, cuda, cuda:N, mps [%(default)s]")
    parser.add_argument("--demo", action="store_true", help="digits, and without --ckpt_path an untrained model [off]")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="glsim-") as folder:
            run(arguments, Path(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
