"""Rewards by rule: what the text of an answer alone, or with a column of its row, is worth.

A rule gives a number from 0 to 1, or says why it cannot, as when a row lacks its column. A wrong answer, an empty one
or a huge one is worth 0 and no failure. Some texts could keep patterns, schemas and mathematics busy for ever, so
`rewards.py` has those rules run in a process of their own.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from luthier.data.strict_json import describe, parse_json
from luthier.errors import DataError, RecipeError
from luthier.recipe.rewards import (
    AnyReward,
    ComparedReward,
    ExactReward,
    JsonReward,
    LengthReward,
    MathReward,
    NumericReward,
    RegexReward,
    TagsReward,
)
from luthier.rollout.numbers import behind, equal_expressions, equal_numbers, number_in
from luthier.rollout.scoring import Answered, Failure, Rule, Score

__all__ = ["RULES", "length_rule", "rule_of"]


def rule_of(settings: AnyReward) -> Rule:
    """The rule by its settings. Raises RecipeError where it needs what is not there: a library, a file."""
    return RULES[settings.type](settings)


def length_rule(settings: LengthReward, count_tokens: Callable[[str], int] | None = None) -> Rule:
    """max(0, 1 - |length - aim| / aim), or max(0, 1 - max(0, length - maximum) / maximum)

    Raises RecipeError where tokens are meant and nobody counts them.
    """
    count = len if settings.unit == "characters" else count_tokens
    if count is None:
        raise RecipeError("reward length: there is no tokenizer to count tokens with; set unit: characters")

    def rule(one: Answered) -> float:
        length = count(one.answer)
        if settings.aim is not None:
            return max(0.0, 1 - abs(length - settings.aim) / settings.aim)
        most = settings.maximum or 1
        return max(0.0, 1 - max(0, length - most) / most)

    return rule


def _json(settings: JsonReward) -> Rule:
    fits = _schema_check(_schema(settings))

    def rule(one: Answered) -> float:
        try:
            return float(fits(parse_json(_unfenced(one.answer))))
        except DataError:
            return 0.0

    return rule


def _regex(settings: RegexReward) -> Rule:
    pattern = re.compile(settings.pattern)
    matches = {"search": pattern.search, "start": pattern.match, "full": pattern.fullmatch}[settings.match]
    return lambda one: float(matches(one.answer) is not None)


def _tags(settings: TagsReward) -> Rule:
    marks = [mark for tag in settings.tags for mark in (f"<{tag}>", f"</{tag}>")]
    form = re.compile(r"\s*".join(f"<{re.escape(tag)}>.*</{re.escape(tag)}>" for tag in settings.tags), re.DOTALL)

    def rule(one: Answered) -> float:
        return float(all(one.answer.count(mark) == 1 for mark in marks) and bool(form.fullmatch(one.answer.strip())))

    return rule


def _compared(settings: ComparedReward, worth: Callable[[str, list[str]], Score]) -> Rule:
    """worth(answer, right): of what is compared, and what the column admits."""

    def rule(one: Answered) -> Score:
        right = _texts(one.row, settings.column)
        if isinstance(right, Failure):
            return right
        answer = _in_tag(one.answer, settings.tag)
        return 0.0 if answer is None else worth(answer, right)

    return rule


def _exact(settings: ExactReward) -> Rule:
    def plain(text: str) -> str:
        text = " ".join(unicodedata.normalize("NFKC", text).split())
        return text.casefold() if settings.ignore_case else text

    return _compared(settings, lambda answer, right: float(plain(answer) in map(plain, right)))


def _numeric(settings: NumericReward) -> Rule:
    def worth(answer: str, right: list[str]) -> Score:
        expected = [found for text in right if (found := number_in(text, "any", settings.marker)) is not None]
        if not expected:
            return _unreadable("number", settings.column, right)
        number = number_in(answer, settings.where, settings.marker)
        return float(number is not None and any(equal_numbers(number, each, settings.tolerance) for each in expected))

    return _compared(settings, worth)


def _math(settings: MathReward) -> Rule:
    equal = equal_expressions()

    def worth(answer: str, right: list[str]) -> Score:
        found = [equal(behind(text, settings.marker).strip(), behind(answer, settings.marker)) for text in right]
        return float(True in found) if set(found) != {None} else _unreadable("mathematics", settings.column, right)

    return _compared(settings, worth)


def _unreadable(what: str, column: str, right: list[str]) -> Failure:
    return Failure(f'no {what} in column "{column}"', f"it says {right[0][-80:]!r}")


RULES: dict[str, Callable[[Any], Rule]] = {
    "exact": _exact,
    "json": _json,
    "length": length_rule,
    "math": _math,
    "numeric": _numeric,
    "regex": _regex,
    "tags": _tags,
}


def _texts(row: Mapping[str, Any], column: str) -> list[str] | Failure:
    """What the column admits: its text, its number as text, or each of its entries."""
    value = row.get(column)
    if value is None:
        return Failure(f'no column "{column}"', f"the row has {', '.join(row) or 'no columns'}")
    entries = list(value) if isinstance(value, list | tuple) else [value]
    if not entries or not all(isinstance(entry, str | int | float | Decimal) for entry in entries):
        return Failure(f'no text in column "{column}"', f"it is {describe(value)}")
    return [str(entry) for entry in entries]


def _in_tag(answer: str, tag: str | None) -> str | None:
    """What stands in the answer's last <tag>...</tag>, or None where there is none; without a tag, all."""
    if tag is None:
        return answer
    before, closing, _ = answer.rpartition(f"</{tag}>")
    _, opening, inside = before.rpartition(f"<{tag}>")
    return inside if closing and opening else None


def _unfenced(answer: str) -> str:
    """The answer, or what stands in the fenced block that is all of it."""
    text = answer.strip()
    first, _, rest = text.partition("\n")
    return rest.removesuffix("```") if first.startswith("```") and rest.endswith("```") else text


def _schema(settings: JsonReward) -> Mapping[str, Any] | bool:
    if settings.schema_file is None:
        return settings.json_schema
    try:
        schema = parse_json(Path(settings.schema_file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise RecipeError(f"reward json: {settings.schema_file} cannot be read ({error}); mend schema_file") from error
    if not isinstance(schema, Mapping | bool):
        raise RecipeError(f"reward json: {settings.schema_file} is {describe(schema)}, no schema; mend the file")
    return schema


def _schema_check(schema: Mapping[str, Any] | bool) -> Callable[[object], bool]:
    """Whether a value is valid. References to other documents are not followed."""
    if schema == {}:
        return lambda value: True
    try:
        from jsonschema import SchemaError, validators
        from referencing import Registry  # an extra that a plain install does not have
    except ImportError as error:
        raise RecipeError(
            'reward json: a schema needs jsonschema; install it with pip install "luthier[rl]"'
        ) from error
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"reward json: the schema is none ({error.message}); mend it") from error
    is_valid: Callable[[object], bool] = kind(schema, registry=Registry()).is_valid
    return is_valid
