"""A tree of settings from YAML: reading, `key.sub=value` overrides, and mistakes as plain sentences.

`Section` is the base of every level of the tree. `read` and `apply_override` make a tree of plain values,
`validate` types it and turns whatever pydantic finds into one sentence per mistake that names the full key,
its value, what is expected there or the nearest valid key. Nothing here knows which settings there are.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import annotated_types
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo


class ConfigError(ValueError):
    """What is wrong with a configuration; `mistakes` holds one sentence each."""

    def __init__(self, mistakes: Sequence[str], origin: str = "the configuration") -> None:
        self.mistakes = tuple(mistakes)
        if len(self.mistakes) == 1:
            text = f"{origin}: {self.mistakes[0]}"
        else:
            lines = "".join(f"\n  - {mistake}" for mistake in self.mistakes)
            text = f"{origin}: {len(self.mistakes)} mistakes:{lines}"
        super().__init__(text)


@dataclass(frozen=True)
class Mistake:
    """One contradiction: the full key it is about and the sentence that says so."""

    key: str
    sentence: str


class ContradictionError(ValueError):
    """Values that are fine one by one and not together."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes
        super().__init__(" ".join(mistake.sentence for mistake in mistakes))


class Section(BaseModel):
    """Base of every section. Values are never coerced: a quoted number is text, a 1 is no boolean."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    other_names: ClassVar[Mapping[str, str]] = {}  # full keys by what other programs call them; at the root

    def contradictions(self) -> Iterator[Mistake]:
        """What is wrong between the values of this section."""
        yield from ()

    @classmethod
    def contradictions_across(cls, parts: Mapping[str, Any]) -> Iterator[Mistake]:
        """What is wrong between the parts of the root; a part with mistakes of its own is absent."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> typing.Self:
        if mistakes := list(self.contradictions()):
            raise ContradictionError(mistakes)
        return self


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML whose numbers are those of YAML 1.2 (`1e-4` is a float) and that knows no dates."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"there is no such file; paths start from {Path.cwd()}"], str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"byte {error.start} is not UTF-8 text"], str(path)) from None
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}"], str(path)) from None


def _parse(text: str, origin: str) -> tuple[Any, list[str]]:
    """The value of a YAML text and a sentence for each key that stands twice. Raises ConfigError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        twice = list(_duplicates(node, ""))
        return loader.construct_document(node), twice
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError([f"not valid YAML: {where}{error.problem or error.context}"], origin) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {str(error).splitlines()[0]}"], origin) from None
    finally:
        loader.dispose()


def _duplicates(node: yaml.Node, prefix: str) -> Iterator[str]:
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _duplicates(item, f"{prefix}{i}.")
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                yield f"{prefix}{name} stands twice, on lines {lines[name]} and {line}: keep one"
            lines[name] = line
            yield from _duplicates(value, f"{prefix}{name}.")


def read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The tree of a YAML file and a sentence for each key that stands twice.

    Raises ConfigError where there is no such file or it holds no YAML mapping.
    """
    tree, twice = _parse(_read_text(path), str(path))
    if tree is None:
        return {}, twice
    if not isinstance(tree, dict):
        raise ConfigError([f"holds {_show(tree)}: expected sections of the form `name:`"], str(path))
    return tree, twice


def apply_override(tree: dict[str, Any], override: str) -> list[str]:
    """Set what `key.sub=value` says, the value read as YAML. Returns the mistakes in it."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        return [f"{override!r} is no override: expected key.sub=value"]
    try:
        value, twice = _parse(text, override)
    except ConfigError as error:
        return [f"the value of {override!r} is {error.mistakes[0]}; quote text that holds YAML signs"]
    return twice or assign(tree, key, value)


def assign(tree: dict[str, Any], key: str, value: object) -> list[str]:
    """Set a value by its full key, making the sections on the way. Returns the mistakes in the key."""
    parts = key.split(".")
    node: Any = tree
    for i, part in enumerate(parts):
        here = ".".join(parts[:i])
        last = i == len(parts) - 1
        empty: Any = [] if not last and parts[i + 1].isdigit() else {}
        if isinstance(node, list):
            if not part.isdigit() or int(part) > len(node):
                return [f"{key} does not exist: {here} has {len(node)} elements, counted from 0"]
            index = int(part)
            if index == len(node):
                node.append(empty)
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            elif node.get(part) is None:
                node[part] = empty
            node = node[part]
        else:
            return [f"{key} does not exist: {here} is {_show(node)}, which has no keys"]
    return []


def validate(root: type[S], tree: dict[str, Any], mistakes: Sequence[str], origin: str) -> S:
    """The typed tree, or a ConfigError with `mistakes` and all that is found here."""
    found = list(mistakes)
    parts: dict[str, Any] = {}
    for name in root.model_fields:
        if name in tree:
            value, wrong = _check_part(root, name, tree[name])
            found += wrong
            if not wrong:
                parts[name] = value
    found += [
        f"{name} is missing: expected {_in_words(_annotation(root, (name,)))}"
        for name, field in root.model_fields.items()
        if field.is_required() and name not in tree
    ]
    found += [_unknown(root, (name,), tree[name]) for name in tree if name not in root.model_fields]
    found += [mistake.sentence for mistake in root.contradictions_across(parts)]
    if found:
        raise ConfigError(list(dict.fromkeys(found)), origin)
    return root(**parts)


@functools.cache
def _adapter(root: type[Section], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_annotation(root, (name,)))


def _check_part(root: type[Section], name: str, value: Any) -> tuple[Any, list[str]]:
    """One value of the root, typed, and the sentences about it.

    Where single keys are wrong, the rest of the section is still searched for contradictions; only those that
    name a key which the user wrote are reported, since the others may follow from the keys left out.
    """
    adapter = _adapter(root, name)
    try:
        # JSON mode: lists become tuples and text becomes paths, everything else stays strict.
        return adapter.validate_json(json.dumps(value, default=str)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    found, contradictions = _sentences(root, details, name)
    wrong = {detail["loc"][0] for detail in details if detail["loc"]}
    if isinstance(value, dict) and wrong:
        rest = {key: item for key, item in value.items() if key not in wrong}
        # A required number that is missing or wrong is stood in for by 1, so that the others can be compared.
        required = {key for key, field in _fields(_annotation(root, (name,))).items() if field.is_required()}
        numbers = {key for key in wrong & required if _strip(_annotation(root, (name, key)))[0] in (int, float)}
        try:
            adapter.validate_json(json.dumps(dict.fromkeys(numbers, 1) | rest, default=str))
        except ValidationError as error:
            _, more = _sentences(root, error.errors(include_url=False), name)
            contradictions += [mistake for mistake in more if lookup({name: rest}, mistake.key)[0]]
    return None, found + [mistake.sentence for mistake in contradictions]


def _sentences(root: type[Section], details: Sequence[Any], name: str) -> tuple[list[str], list[Mistake]]:
    """pydantic's errors as sentences about single keys, and the contradictions among them."""
    found: list[str] = []
    contradictions: list[Mistake] = []
    for detail in details:
        location = (name, *detail["loc"])
        key = ".".join(str(part) for part in location)
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ContradictionError):
            contradictions += cause.mistakes
        elif detail["type"] == "extra_forbidden":
            found.append(_unknown(root, location, detail["input"]))
        elif detail["type"] == "missing":
            found.append(f"{key} is missing: expected {_in_words(_annotation(root, location))}")
        else:
            found.append(about(key, detail["input"], f"expected {_in_words(_annotation(root, location))}").sentence)
    return found, contradictions


def about(key: str, value: object, text: str) -> Mistake:
    """The mistake that `key` has this value; `text` says what is expected or what to do."""
    return Mistake(key, f"{key} is {_show(value)}: {text}")


def _show(value: object) -> str:
    """A value as the user would write it, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def lookup(tree: object, key: str) -> tuple[bool, Any]:
    """Whether a full key is there, and its value."""
    for part in key.split("."):
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return False, None
    return True, tree


def _unknown(root: type[Section], location: tuple[int | str, ...], value: object) -> str:
    """The sentence about a key that does not exist, with the nearest that does."""
    key = ".".join(str(part) for part in location)
    name = str(location[-1])
    siblings = _keys_below(_strip(_annotation(root, location[:-1]))[0], "", deep=False)
    prefix = key[: -len(name)]
    every = list(_keys_below(root, "", deep=True))
    by_name = {other.rpartition(".")[2]: other for other in reversed(every)}
    if name in root.other_names:
        nearest = root.other_names[name]
    elif close := difflib.get_close_matches(name, list(siblings), 1, 0.6):
        nearest = prefix + close[0]
    elif close := difflib.get_close_matches(name, list(by_name), 1, 0.8):
        nearest = by_name[close[0]]
    else:
        nearest = difflib.get_close_matches(key, every, 1, 0.0)[0]
    return f"{key} ({_show(value)}) is not a key: the nearest valid one is {nearest}"


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    """The fields of a section by key; none where the annotation is no section."""
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation.model_fields if is_section else {}


def _keys_below(annotation: Any, prefix: str, deep: bool) -> Iterator[str]:
    """The keys of a section; `deep`: full keys down to the values, the first element standing for a list."""
    for name, field in _fields(annotation).items():
        yield prefix + name
        if deep:
            inner, step = _strip(field.annotation)[0], "."
            if typing.get_origin(inner) is tuple:
                inner, step = typing.get_args(inner)[0], ".0."
            yield from _keys_below(inner, prefix + name + step, deep)


def _strip(annotation: Any) -> tuple[Any, list[Any], bool]:
    """An annotation without Annotated and None; its constraints; whether None is allowed."""
    metadata: list[Any] = []
    optional = False
    while True:
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Annotated:
            for item in arguments[1:]:
                metadata += item.metadata if isinstance(item, FieldInfo) else [item]
            annotation = arguments[0]
        elif origin in (typing.Union, types.UnionType):
            (annotation,) = (argument for argument in arguments if argument is not type(None))
            optional = True
        else:
            return annotation, metadata, optional


def _annotation(root: type[Section], location: Sequence[int | str]) -> Any:
    """The annotation of a place in the tree, its constraints included."""
    annotation: Any = root
    for part in location:
        inner, _, _ = _strip(annotation)
        if isinstance(part, int):
            arguments = typing.get_args(inner)
            annotation = arguments[0 if arguments[-1] is Ellipsis else part]
        else:
            field = _fields(inner).get(part)
            if field is None:
                return None
            annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return annotation


_SIMPLE = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_BOUNDS: tuple[tuple[type, str, str], ...] = (
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "at most"),
    (annotated_types.Lt, "lt", "below"),
)


def _plain(bound: float) -> float:
    return int(bound) if bound == int(bound) else bound


def _in_words(annotation: Any) -> str:
    inner, metadata, optional = _strip(annotation)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is Literal:
        text = (" or " if len(arguments) < 3 else ", ").join(str(argument) for argument in arguments)
        text = text if len(arguments) < 3 else f"one of {text}"
    elif origin is tuple and arguments[-1] is Ellipsis:
        text = f"a list with elements of the form {_in_words(arguments[0])}"
    elif origin is tuple:
        text = f"[{', '.join(_in_words(argument) for argument in arguments)}]"
    elif fields := _fields(inner):
        text = f"{{{', '.join(fields)}}}" if len(fields) < 6 else "a section of keys"
    else:
        text = _SIMPLE.get(inner, "a section")
    bounds = [
        f"{word} {_show(_plain(getattr(item, name)))}"
        for item in metadata
        for kind, name, word in _BOUNDS
        if isinstance(item, kind)
    ]
    return " ".join([text, " and ".join(bounds)]).strip() + (" or null" if optional else "")
