"""JSON that means one thing only.

Python's parser takes NaN, lets the last of two equal keys win, turns 1e999 into infinity and follows any nesting.
A training row must not depend on such choices, so each is refused here with a reason. Files and the JSON that stands
inside a row's strings (tool calls, tool lists) come through the same function.
"""

import json
import math
from typing import Any, NoReturn

from luthier.errors import DataError

__all__ = ["MAX_DEPTH", "describe", "parse_json"]

MAX_DEPTH = 100


def parse_json(text: str) -> Any:
    """The value that `text` spells; DataError with the reason where it is not strict JSON.

    Refused beside broken syntax: NaN and infinities, a key that stands twice in one object, numbers beyond a double,
    integers of thousands of digits, and more than MAX_DEPTH levels of nesting.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"is not valid JSON: {error.msg} at {_place(error, text)}") from None
    except RecursionError:
        raise DataError(f"is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise DataError("holds an integer of thousands of digits") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_too_deep(value):
        raise DataError(f"is nested deeper than {MAX_DEPTH} levels")
    return value


def describe(value: Any) -> str:
    """What a value is, in words short enough for an error message: `the number 7`, `an empty text`, `a list`."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {str(value)[:30]}" if abs(value) < 1e30 else "a huge number"
        case str():
            return f"the text {json.dumps(value[:40])}" if value.strip() else "an empty text"
        case list() | tuple():
            return "a list" if value else "an empty list"
        case dict():
            return "an object" if value else "an empty object"
    return f"a value of type {type(value).__name__}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"has the key {json.dumps(twice[:40])} twice in one object")
    return values


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DataError(f"holds the number {text[:30]}, which is too large")
    return number


def _refuse(constant: str) -> NoReturn:
    raise DataError(f"holds {constant}, which is not JSON; write null or leave the key out")


def _place(error: json.JSONDecodeError, text: str) -> str:
    return f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        children = [
            item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)
        ]
        if not children:
            return False
        level = [child for group in children for child in group]
    return True


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)
