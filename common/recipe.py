"""A script's dataclass becomes its command line; no script knows argparse.

Every field is a flag (`batch_size` -> `--batch-size`, `--batch_size` works too) with the field's default, and the
comment behind a field in the source is the flag's help, so that a script states each number once. Supported
annotations: bool (`--x`, or `--no-x` too where it is on by default), int, float, str, each of these three `| None`
(the word `none`), Literal of words (`| None` too), list[str] and list[float] (one or more), dict[str, Any]
(`key=value` words).
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import json
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar

from common.errors import UserError, brief

RecipeT = TypeVar("RecipeT")
OptionsT = TypeVar("OptionsT")

OPTIONAL_VALUE = "value if given bare"  # metadata key: `--resume` may stand alone and then means this
TURNS_OFF = "turns off"  # metadata key of a bool that is on: its bare flag turns it off, as some published flags do


def parse(
    recipe_class: type[RecipeT],
    options_class: type[OptionsT],
    description: str,
    argv: Sequence[str] | None = None,
    without: Collection[str] = (),
    separator: str = "-",
    configure: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    known: Mapping[str, str] = MappingProxyType({}),
) -> tuple[RecipeT, OptionsT, dict[str, Any], dict[str, Any]]:
    """Reads the command line into both dataclasses.

    A field without a default must be given; the options named in `without` have no flag. `separator`, "-" or "_",
    stands between the words of a flag; the other is understood too. `configure` says recipe fields by what was given of
    them, which wins; every bool of the recipe then has a `--no-` flag. `known` are names that are no flags, and what to
    say of them. Returns the recipe, the options, and the fields of each that were given explicitly (name -> value).
    Exits with status 2 and one sentence on an unknown flag or a value of the wrong type.
    """
    parser = _Parser(
        usage="%(prog)s [--flag VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.known = {f"--{name}": sentence for name, sentence in known.items()}
    recipe = parser.add_argument_group("recipe (the published values are the defaults)")
    _add_fields(recipe, recipe_class, separator, negatable=configure is not None)
    running = parser.add_argument_group("running it")
    _add_fields(running, options_class, separator, without)
    running.add_argument(
        f"--local{separator}rank",
        type=int,
        default=-1,
        metavar="N",
        help="torch.distributed.launch passes it; its environment variables, which say more, decide [-1]",
    )
    words = sys.argv[1:] if argv is None else argv
    given = vars(parser.parse_args([_separated(word, separator) for word in words]))
    given.pop("local_rank")
    names = {field.name for field in dataclasses.fields(recipe_class)}  # type: ignore[arg-type]
    overrides = {name: value for name, value in given.items() if name in names}
    chosen = {name: value for name, value in given.items() if name not in names}
    configured = configure(overrides) if configure is not None else {}
    return recipe_class(**(configured | overrides)), options_class(**chosen), overrides, chosen


def field_comments(cls: type) -> dict[str, str]:
    """The trailing comment of each field in the source of dataclass `cls` and of those it extends, by field name."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= _own_comments(base)
    return comments


def _own_comments(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # defined in an interactive session: there is no file to read
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    comments = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)  # a formatter may wrap a field
            comments[node.target.id] = " ".join(by_line[line] for line in lines if line in by_line)
    return comments


def _add_fields(
    group: argparse._ArgumentGroup,
    cls: type,
    separator: str,
    without: Collection[str] = (),
    negatable: bool = False,
) -> None:
    hints = typing.get_type_hints(cls)
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        flag = "--" + field.name.replace("_", separator)
        required = _default(field) is dataclasses.MISSING
        settings = _settings(hints[field.name], _default(field))
        if negatable and settings == {"action": "store_true"}:
            settings = {"action": argparse.BooleanOptionalAction}
        if OPTIONAL_VALUE in field.metadata:
            settings |= {"nargs": "?", "const": field.metadata[OPTIONAL_VALUE]}
        shown = "required" if required else _shown(_default(field))
        text = f"{comments.get(field.name, '')} [{shown}]".strip().replace("%", "%%")
        flags = [flag]
        if field.metadata.get(TURNS_OFF):
            flags, settings = [flag, f"--no-{flag[2:]}"], {"action": "store_false"}
            text = f"turns off: {text}"
        group.add_argument(*flags, default=argparse.SUPPRESS, required=required, help=text, **settings)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(value) or "none"
    return str(value)


def _settings(hint: Any, default: Any) -> dict[str, Any]:
    """The keyword arguments of add_argument for one annotation."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        optional, hint = True, kinds[0]
    origin = typing.get_origin(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if origin is Literal:
        words = typing.get_args(hint)
        if not optional:
            return {"choices": words}
        return {"choices": (*words, None), "type": _or_none(str), "metavar": "{" + ",".join((*words, "none")) + "}"}
    if origin is list:
        return {"nargs": "+", "metavar": "X", "type": typing.get_args(hint)[0]}
    if origin is dict:
        return {"nargs": "*", "metavar": "KEY=VALUE", "action": _KeyValues}
    if hint not in (int, float, str):
        raise TypeError(f"a field annotated {hint} cannot be a flag: see the annotations that common.recipe supports")
    return {"type": _or_none(hint) if optional else hint, "metavar": {int: "N", float: "X", str: "S"}[hint]}


def _or_none(kind: type) -> Any:
    def convert(word: str) -> Any:
        return None if word.lower() == "none" else kind(word)

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return convert


def _separated(word: str, separator: str) -> str:
    """`--batch_size=8` -> `--batch-size=8`; values stay as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    flag = "--" + flag[2:].replace("-", separator).replace("_", separator)
    return flag.replace("--no_", "--no-") + equals + value  # argparse spells this one itself


def check_value(source: str | Path, key: str, value: Any, fields_class: type) -> Any:
    """Return the value of the field `key` of a dataclass, integers and words for floats as floats.

    Raises UserError, naming `source`, the file that it comes from, and the field, where it is of another type or no
    choice.
    """
    kinds = _kinds(typing.get_type_hints(fields_class)[key])
    for kind in kinds:
        with suppress(ValueError, OverflowError):
            return _as(kind, value)
    expected = " or ".join(kind if isinstance(kind, str) else NAMES[kind] for kind in kinds)
    raise UserError(f"{source}: {key}: {brief(value)} is of the wrong type or no choice: expected {expected}")


def _as(kind: Any, value: Any) -> Any:
    """The value as one of this kind; ValueError for another."""
    if kind is float and type(value) in (int, str):  # YAML reads 1e-5 as a word
        return float(value)
    if kind == list[float] and type(value) is list:
        return [_as(float, item) for item in value]
    if kind == list[str] and type(value) is list:
        return [_as(str, item) for item in value]
    if kind is int and type(value) is int and value.bit_length() > INTEGER_BITS:
        raise ValueError
    if kind is dict:
        _check_parts(value)
    if value == kind if isinstance(kind, str) else type(value) is kind:
        return value
    raise ValueError


def _check_parts(value: Any) -> None:
    """ValueError unless all that is inside has a JSON form, and is not without end: pickles can name a list often."""
    parts, count = [value], 0
    while parts:
        part = parts.pop()
        count += 1
        inner = [*part, *part.values()] if type(part) is dict else part if type(part) in (list, tuple) else []
        if count + len(inner) > MOST_PARTS or not (type(part) in PLAIN or part is None):
            raise ValueError
        parts.extend(inner)


INTEGER_BITS = 63  # what torch takes
MOST_PARTS = 1000  # of arguments in arguments
PLAIN = (bool, int, float, str, list, tuple, dict)
NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
    type(None): "null",
}


def _kinds(hint: Any) -> list[Any]:
    """The types, and the words of a Literal, that an annotation allows."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    if origin is Literal:
        return list(typing.get_args(hint))
    return [dict if origin is dict else hint]


class _KeyValues(argparse.Action):
    """`--model-kwargs depth=9 act_layer=gelu` -> {"depth": 9, "act_layer": "gelu"}, as timm's train.py reads it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        pairs: dict[str, Any] = {}
        for word in values:
            key, equals, value = word.partition("=")
            if not equals or not key:
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {word!r}")
            pairs[key] = _literal(value)
        setattr(namespace, self.dest, pairs)


def _literal(word: str) -> Any:
    """What `word` means in Python's notation, if model.json and records can hold that; else the word itself."""
    try:
        value = ast.literal_eval(word)
        json.dumps(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return word
    return value


class _Parser(argparse.ArgumentParser):
    known: Mapping[str, str] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        """One sentence instead of the whole usage; the nearest flag where one was mistyped."""
        hint = "--help lists every flag"
        if message.startswith("unrecognized arguments: -"):
            word = message.split(": ", 1)[1].split()[0].partition("=")[0]
            near = difflib.get_close_matches(word, list(self._option_string_actions), n=1)
            hint = f"did you mean {near[0]}? {hint}" if near else hint
            hint = f"{word} {self.known[word]}" if word in self.known else hint
        line = " ".join(message.split())  # a word of the command line may hold line ends
        self.exit(2, f"{self.prog}: error: {line}; {hint}\n")
