"""YAML in with the line of every value, YAML out.

Plain words are read by the rules of YAML 1.2, so that `2e-5` is a number and `no` is a word; what a word means is then
decided by the field it stands in. Left out on purpose, each with an error: tags, which could make objects, aliases, and
several documents in a file. Names in a mapping are always text, and one given twice is an error.
"""

import re
from dataclasses import dataclass, field

import yaml

from luthier.errors import RecipeError
from luthier.recipe.problems import Path, Problem

__all__ = ["Document", "read_yaml", "write_yaml"]

_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    spelling: value
    for word, value in (("true", True), ("false", False))
    for spelling in (word, word.title(), word.upper())
}
_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")  # more digits than Python's int() reads are no number
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TAGS = {  # what plain YAML comes to without a tag being written
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value", "seq", "map")
}


@dataclass(slots=True)
class Document:
    """What a YAML text says: the value, the line of each path in it (from 1), and problems that only YAML knows of."""

    value: object = None
    lines: dict[Path, int] = field(default_factory=dict)
    found: list[tuple[int, Problem]] = field(default_factory=list)

    @property
    def refused(self) -> set[Path]:
        """The paths that already have a problem."""
        return {problem.path for _, problem in self.found}

    def line(self, path: Path) -> int:
        """The line where a value stands, or the nearest value around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_yaml(text: str, name: str) -> Document:
    """The one document in `text`; raises RecipeError where it is not YAML, with `name` and the line."""
    node = _compose(text, name)
    if node is None:
        raise RecipeError(f"{name}:1: the file is empty; a recipe names at least its stages")
    reader = _Reader(Document())
    reader.document.value = reader.read(node, ())
    return reader.document


def write_yaml(value: object) -> str:
    """A text that `read_yaml` reads as the same value, without tuples."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{name}:{line}: this is not text (it holds {_shown(error.character)}); is it a recipe?"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{name}:{mark.line + 1 if mark else 1}: {_complaint(error.problem or '')}") from None
    except RecursionError:
        raise RecipeError(f"{name}:1: the values are nested too deeply for a recipe") from None
    return node


def _shown(character: int | str | bytes) -> str:
    return f"U+{character if isinstance(character, int) else ord(character):04X}"


def _complaint(problem: str) -> str:
    if r"'\t'" in problem:
        return "a tab stands where YAML wants spaces; indent with spaces"
    if "another document" in problem:
        return 'a second document starts here; a recipe is one document, so remove the "---"'
    return f"this is not YAML ({problem}); check colons, quotes and indentation"


@dataclass(slots=True)
class _Reader:
    document: Document
    seen: set[int] = field(default_factory=set)

    def read(self, node: yaml.Node, path: Path) -> object:
        line = node.start_mark.line + 1
        self.document.lines.setdefault(path, line)
        if id(node) in self.seen:  # an alias is the very node that it stands for
            self._refuse(line, path, "aliases (*name) are not read in recipes; write the value out")
            return None
        self.seen.add(id(node))
        if node.tag not in _TAGS:
            self._refuse(line, path, f"tags are not read in recipes; remove {_written_tag(node.tag)}")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        return _plain(node.value) if isinstance(node, yaml.ScalarNode) and node.style is None else node.value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        values: dict[str, object] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(line, path, "a name must be text, not a list or a mapping")
            elif key.value in values:
                first = self.document.lines[(*path, key.value)]
                self._refuse(line, (*path, key.value), f"given twice, first on line {first}; keep one")
            else:
                self.document.lines[(*path, key.value)] = line
                values[key.value] = self.read(value, (*path, key.value))
        return values

    def _refuse(self, line: int, path: Path, message: str) -> None:
        self.document.found.append((line, Problem(path, message)))


def _plain(text: str) -> object:
    """What an unquoted word is by YAML 1.2's core rules."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _written_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = None if isinstance(_plain(text), str) and text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
