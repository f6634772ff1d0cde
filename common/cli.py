"""A dataclass is a command line: every field a flag, the comment behind it its help, its value the default.

`batch_size` -> `--batch-size` or `--batch_size`. Annotations: bool (`--x`, or `--no-x` too where it is on), int, float,
str, Literal of words, each of these but bool `| None` (the word `none`), list[str], list[float], dict[str, Any]
(`key=value` words).
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import math
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from common.errors import UserError

BARE = "value if given bare"  # metadata key: `--resume` alone means this
TURNS_OFF = "turns off"  # metadata key of a bool that is on: its bare flag turns it off, as some published flags do
NEWEST, AUTO = "newest", "auto"  # what --resume means instead of a folder


@dataclass
class Options:
    """What every program understands beside its recipe."""

    output: str = "runs"  # a run's files go to OUTPUT/<program>/<time>-<id>/
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of forward and backward
    amp_backend: Literal["native", "apex"] = "native"  # apex: where apex.amp is installed, for fp16
    accumulate: int = 1  # micro-batches an optimizer step is made of; the batch size stays, the memory falls
    deterministic: bool = False  # equal bit for bit when run again, also on a GPU; slower there
    grad_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: bool = False  # torch.compile the model: faster once the first minutes of compiling are over
    workers: int | None = None  # data-loading processes per training process; none: 4, or the cores if they are fewer
    pin_memory: bool = True  # page-locked memory on the way to a GPU
    eval_batch_size: int | None = None  # images per process in evaluation; none: the training batch size
    log_every: int = 50  # optimizer steps between two lines of log.jsonl
    save_every: int | None = None  # optimizer steps between two saves of last.pt, beside one at each evaluation
    resume: str | None = field(default=None, metadata={BARE: NEWEST})  # go on: the newest run, or DIR; auto: else anew
    eval: str | None = None  # no training: evaluate a run's folder, our .safetensors or a released checkpoint
    predict: list[str] | None = None  # no training: name what is on these images (files, folders)
    export: str | None = None  # no training: write the model to this .onnx or .pt2 file, class names beside it
    checkpoint: str | None = None  # the model for --predict and --export, as for --eval; none: the newest run's best
    top: int = 5  # guesses an image for --predict
    out: str | None = None  # also write the predictions to a .csv or .json file
    download: bool = True  # fetch the data set where it is missing and its authors allow it
    dist_timeout: float = 1800  # seconds that a process waits for the others; downloads may take longer
    limit: int | None = None  # use only the first N images of each split: a trial that never counts as a result
    wandb: bool = False  # log to Weights & Biases too (pip install wandb)
    demo: bool = False  # a small model on handwritten digits in this data set's layout: no download, a minute on a CPU


@dataclass(frozen=True)
class Flags:
    """How a program spells its flags in --help and messages: the words between which `separator` stands, and names of
    its own for some of ours.
    """

    separator: str = "-"
    names: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, name: str) -> str:
        return "--" + self.names.get(name, name).replace("_", self.separator)


def parse(
    recipe_class: type[Any],
    options_class: type[Any],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    flag: Flags = Flags(),
    without: Collection[str] = (),
    may_be_zero: Collection[str] = ("seed", "weight_decay", "workers"),
    configure: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    known: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[Any, Any, dict[str, Any]]:
    """Recipe, options, and the fields of both that were typed (name -> value).

    What was typed wins over `configure` (typed fields -> fields that configuration files say; every bool of the recipe
    then has a `--no-` flag), which wins over the defaults. `without` are options that have no flag here. `known` are
    names that are no flags, and what to say of them. Exits with status 2 and one sentence on an unknown flag or a value
    of the wrong type. UserError for a number below 0, or 0 for one that is not in `may_be_zero`.
    """
    parser = _Parser(
        usage="%(prog)s [--flag VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.known = {f"--{name}": sentence for name, sentence in known.items()}
    group = parser.add_argument_group("recipe (the published values are the defaults)")
    _add_fields(group, recipe_class, flag.separator, negatable=configure is not None)
    running = parser.add_argument_group("running it")
    _add_fields(running, options_class, flag.separator, without=without)
    running.add_argument(
        f"--local{flag.separator}rank",
        type=int,
        metavar="N",
        help="torch.distributed.launch passes it; its environment variables, which say more, decide [none]",
    )
    words = [_respelt(word, flag.separator) for word in (sys.argv[1:] if argv is None else argv)]
    given = vars(parser.parse_args(words))
    given.pop("local_rank")
    typed = of_recipe(recipe_class, given)
    recipe = recipe_class(**((configure(typed) if configure else {}) | typed))
    options = options_class(**{name: value for name, value in given.items() if name not in typed})
    for fields in (recipe, options):
        check_numbers(fields, may_be_zero, flag)
    return recipe, options, given


def of_recipe(recipe_class: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given fields that are the recipe's."""
    names = {field.name for field in dataclasses.fields(recipe_class)}
    return {name: value for name, value in given.items() if name in names}


def check_numbers(fields: Any, may_be_zero: Collection[str], flag: Flags) -> None:
    """UserError for a number that nothing can be done with."""
    for name, value in vars(fields).items():
        limit = {int: 2**63, float: math.inf}.get(type(value))  # torch's integers have 64 bits
        if limit and not ((value >= 0 if name in may_be_zero else value > 0) and value < limit):
            least = "0 or more" if name in may_be_zero else "more than 0"
            raise UserError(f"{flag(name)} {value}: expected {least}, and less than {limit}")


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field in the source of a dataclass and of those it extends."""
    comments: dict[str, str] = {}
    for base in (base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)  # a formatter may wrap a field
                comments[node.target.id] = " ".join(by_line[line] for line in lines if line in by_line)
    return comments


def _add_fields(group: Any, cls: type, separator: str, negatable: bool = False, without: Collection[str] = ()) -> None:
    hints, comments = typing.get_type_hints(cls), field_comments(cls)
    for field_ in dataclasses.fields(cls):
        if field_.name in without:
            continue
        flag, default, text = "--" + field_.name.replace("_", separator), _default(field_), comments[field_.name]
        flags, settings = [flag], _settings(hints[field_.name], default)
        if negatable and settings == {"action": "store_true"}:
            settings = {"action": argparse.BooleanOptionalAction}
        if BARE in field_.metadata:
            settings |= {"nargs": "?", "const": field_.metadata[BARE]}
        if TURNS_OFF in field_.metadata:
            flags, settings, text = [flag, f"--no-{flag[2:]}"], {"action": "store_false"}, f"turns off: {text}"
        required = default is dataclasses.MISSING
        shown = f"{text} [{'required' if required else _shown(default)}]".replace("%", "%%")
        group.add_argument(*flags, default=argparse.SUPPRESS, required=required, help=shown, **settings)


def _default(field_: "dataclasses.Field[Any]") -> Any:
    return field_.default if field_.default_factory is dataclasses.MISSING else field_.default_factory()


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return "none" if value is None else " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _settings(hint: Any, default: Any) -> dict[str, Any]:
    """The keyword arguments of add_argument for an annotation."""
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if origin is Literal:
        words = {
            "choices": (*arguments, None),
            "type": _or_none(str),
            "metavar": "{" + ",".join((*arguments, "none")) + "}",
        }
        return words if optional else {"choices": arguments}
    if origin is list:
        return {"nargs": "+", "metavar": "X", "type": arguments[0]}
    if origin is dict:
        return {"nargs": "*", "metavar": "KEY=VALUE", "action": _KeyValues}
    return {"type": _or_none(hint) if optional else hint, "metavar": {int: "N", float: "X", str: "S"}[hint]}


def _or_none(kind: type) -> Any:
    def convert(word: str) -> Any:
        return None if word.lower() == "none" else kind(word)

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return convert


def _respelt(word: str, separator: str) -> str:
    """`--batch_size=8` -> `--batch-size=8`; values stay as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    flag = "--" + flag[2:].replace("-", separator).replace("_", separator)
    return flag.replace("--no_", "--no-") + equals + value  # argparse spells this one itself


class _KeyValues(argparse.Action):
    """`--model-kwargs depth=9 act_layer=gelu` -> {"depth": 9, "act_layer": "gelu"}, as timm's train.py reads it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        pairs = [word.partition("=") for word in values]
        if not all(key and equals for key, equals, _ in pairs):
            raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {values!r}")
        setattr(namespace, self.dest, {key: _literal(value) for key, _, value in pairs})


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


class _Parser(argparse.ArgumentParser):
    known: Mapping[str, str]

    def error(self, message: str) -> NoReturn:
        """One sentence instead of the whole usage, with the nearest flag where one was mistyped."""
        hint = "--help lists every flag"
        if message.startswith("unrecognized arguments: -"):
            word = message.split(": ", 1)[1].split()[0].partition("=")[0]
            near = difflib.get_close_matches(word, list(self._option_string_actions), n=1)
            hint = (
                f"{word} {self.known[word]}"
                if word in self.known
                else f"did you mean {near[0]}? {hint}"
                if near
                else hint
            )
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; {hint}\n")
