"""Settings as command-line flags and back, without a command-line library.

Every field is one flag: dashes for underscores, dots for what is nested (`--adapter.target-modules`), and help from the
string under the field. Several values are the flag given several times; names with values are `name=value`, and
the last `=` separates. `--adapter none` trains the model itself, `--adapter lora` or any `--adapter.r 8` an adapter;
`--reward numeric` is a reward by its type, `--reward rewards.py:score` one by its function. `--forgetting general.txt`
is the field that a bare value means, `--forgetting.text`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from pydantic import BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from luthier.errors import RecipeError
from luthier.recipe.problems import Problem, Problems, nearest, problems_in, unknown
from luthier.recipe.settings import Settings, branches, short_forms, type_names

__all__ = ["Flag", "flags_of", "settings_from_flags"]

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Flag:
    """One field as a flag.

    path: the names that lead to the field. default: None where it is derived from other fields or there is none.
    multiple: the flag may be given several times. choices: all words that it takes, or empty where it takes others too.
    """

    name: str
    path: tuple[str, ...]
    annotation: Any
    default: object
    help: str
    required: bool
    multiple: bool
    choices: tuple[str, ...]

    @property
    def negative(self) -> str | None:
        """The flag that says no, for a field that is true or false: `--no-packing`."""
        return f"--no-{self.name.removeprefix('--')}" if self.annotation is bool else None


def flags_of(cls: type[Settings]) -> list[Flag]:
    """All flags of a settings class, in the order of its fields, nested ones after the field that holds them."""
    flags: dict[str, Flag] = {}
    for flag in _flags(cls, ()):
        first = flags.setdefault(flag.name, flag)  # two types of adapter share most of their fields
        flags[flag.name] = replace(first, choices=tuple(dict.fromkeys(first.choices + flag.choices)))
    return list(flags.values())


def settings_from_flags(cls: type[S], values: Mapping[str, object]) -> S:
    """Settings made of flags; what is None or an empty sequence counts as not given.

    values: by the flag's name (`--adapter.r`), as text, or as bool for a field that is true or false, or as a sequence
    for a flag that may be given several times. Raises RecipeError, one line a flag, with the nearest valid name.
    """
    flags = {flag.name: flag for flag in flags_of(cls)}
    try:
        return cls.model_validate(_tree(flags, values))
    except Problems as error:
        found = error.found
    except ValidationError as error:
        found = tuple(problems_in(error, {}))
    raise RecipeError("\n".join(_complaint(problem, flags.values()) for problem in found))


def _flags(cls: type[Settings], path: tuple[str, ...]) -> Iterator[Flag]:
    for name, field in cls.model_fields.items():
        nested = _nested(field.annotation)
        if _choices(field.annotation) or short_forms(field.annotation) or not nested:
            yield _flag((*path, name), field)
        for member in nested:
            yield from _flags(member, (*path, name))


def _flag(path: tuple[str, ...], field: FieldInfo) -> Flag:
    return Flag(
        name=_name(path),
        path=path,
        annotation=field.annotation,
        default=_default(field),
        help=" ".join((field.description or "").split()),
        required=field.is_required() and len(path) == 1,  # deeper, only where its type is chosen
        multiple=_takes_several(field.annotation),
        choices=() if _reads_functions(field) else _choices(field.annotation),
    )


def _name(path: tuple[str, ...]) -> str:
    return "--" + ".".join(path).replace("_", "-")


def _nested(annotation: Any) -> list[type[Settings]]:
    return [kind for kind in branches(annotation) if isinstance(kind, type) and issubclass(kind, Settings)]


def _takes_several(annotation: Any) -> bool:
    short = [kind.model_fields[str(kind.short_form)] for kind in _nested(annotation) if kind.short_form is not None]
    kinds = [*branches(annotation), *(kind for field in short for kind in branches(field.annotation))]
    return any(get_origin(kind) in (tuple, dict) for kind in kinds)


def _default(field: FieldInfo) -> object:
    if field.is_required() or field.default_factory is not None:
        return None
    return next(iter(type_names(type(field.default))), field.default)


def _choices(annotation: Any) -> tuple[str, ...]:
    """All words that a value can be, if they can be counted."""
    words: list[str] = []
    for kind in branches(annotation):
        if get_origin(kind) is Literal:
            words += get_args(kind)
        elif kind is NoneType:
            words.append("none")
        elif get_origin(kind) is tuple and _choices(get_args(kind)[0]):
            words += _choices(get_args(kind)[0])
        elif type_names(kind):
            words += type_names(kind)
        else:
            return ()
    return tuple(words)


def _reads_functions(field: FieldInfo) -> bool:
    """Whether the field's own reading takes a function in a file where it takes the words of types."""
    for reading in field.metadata:
        if isinstance(reading, BeforeValidator):
            try:
                cast(Callable[[object], object], reading.func)("file.py:function")
            except Problems:
                continue
            return True
    return False


def _tree(flags: Mapping[str, Flag], values: Mapping[str, object]) -> dict[str, Any]:
    given = {name: value for name, value in values.items() if value is not None and value not in ((), [])}
    strange = [Problem((name,), _unknown(name, flags)) for name in given if name not in flags]
    if strange:
        raise Problems(strange)
    tree: dict[str, Any] = {}
    for name in sorted(given, key=lambda name: len(flags[name].path)):
        _place(tree, flags[name].path, _value(flags[name], given[name]))
    return tree


def _unknown(name: str, flags: Mapping[str, Flag]) -> str:
    """Compared by the fields' own words too, so that `--lora-r` leads to `--adapter.r`."""
    words = {flag.path[-1]: flag.name for flag in flags.values()}
    words |= {".".join(flag.path): flag.name for flag in flags.values()}
    near = nearest(name.removeprefix("--"), words)
    return f'unknown flag; did you mean "{words[near]}"?' if near else unknown("flag", name, list(flags))


def _place(tree: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    """Puts a value at its path; where the flag of an outer field named a type, it becomes that field's `type`."""
    for depth, step in enumerate(path[:-1], start=1):
        inner = tree.setdefault(step, {})
        if inner == "none":
            raise Problems([Problem(path, f"there is none by {_name(path[:depth])} none; leave one of the two out")])
        if isinstance(inner, list):
            message = f"{_name(path[:depth])} names several, and no flag can say of which this is; name one"
            raise Problems([Problem(path, message)])
        if isinstance(inner, str):
            tree[step] = {"type": inner}
        tree = tree[step]
    said = tree.get(path[-1], value)
    if said != value:
        raise Problems([Problem(path, f"{_name(path[:-1])} {said} says another; leave one of the two out")])
    tree[path[-1]] = value


def _value(flag: Flag, value: object) -> object:
    several = list(value) if isinstance(value, list | tuple) else [value]
    if any(get_origin(kind) is dict for kind in branches(flag.annotation)):
        return dict(_entry(flag, str(entry)) for entry in several)
    if (short := short_forms(flag.annotation)) and several != ["none"]:
        return {short[0]: several[0] if len(several) == 1 else several}
    return several[0] if len(several) == 1 else several


def _entry(flag: Flag, text: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")  # the last one: paths of files may hold others
    if not equals:
        raise Problems([Problem(flag.path, f'expected name=value, got "{text}"')])
    return name, value


def _complaint(problem: Problem, flags: Iterable[Flag]) -> str:
    """The problem by the name of its flag; what lies deeper (an entry of a list) follows."""
    near = [flag for flag in flags if problem.path[: len(flag.path)] == flag.path]
    if not near:
        return str(problem)
    flag = max(near, key=lambda flag: len(flag.path))
    return f"{flag.name}: {Problem(problem.path[len(flag.path) :], problem.message)}"
