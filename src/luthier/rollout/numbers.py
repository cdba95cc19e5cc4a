r"""The number that an answer gives, and whether an expression equals another.

A number is read behind a marker such as GSM8K's `####`, in the last `\boxed{}`, or as the last of the text, and kept as
a decimal, so that 0.1 is 0.1 and a number of any size is compared at once. Expressions are math-verify's business.
"""

import logging
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Literal

from luthier.errors import RecipeError

__all__ = ["Where", "behind", "equal_expressions", "equal_numbers", "number_in"]

Where = Literal["any", "marker", "boxed", "last"]

_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z)])[-+\u2212])?[$€£]?"  # 10-3 is two numbers, -$3 is one
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<exponent>[eE][-+]?\d{1,6}(?!\d))?"
)
_BOXED = "\\boxed{"
_IN_WORDS = re.compile(
    r"\$|\\boxed|\\[(\[]|(?<!\\)\b[A-Za-z]{2}"
)  # a text that holds an expression, and is none itself


def number_in(text: str, where: Where, marker: str) -> Decimal | None:
    r"""The number that counts: the first behind the last marker, the last in the last \boxed{}, or the last of all.

    where: one of these, or `any`: the first of the three that the text has.
    """
    if where == "marker" or (where == "any" and marker in text):
        return next(iter(_numbers(text.rpartition(marker)[2])), None) if marker in text else None
    if where == "boxed" or (where == "any" and _BOXED in text):
        text = _boxed(text)
    return next(iter(_numbers(text)[-1:]), None)


def behind(text: str, marker: str) -> str:
    """What stands behind the last marker, or the whole text where there is none."""
    return text.rpartition(marker)[2]


def equal_numbers(one: Decimal, other: Decimal, tolerance: float) -> bool:
    """|one - other| <= tolerance, exact where nothing is tolerated."""
    return one == other or abs(float(one) - float(other)) <= tolerance


def equal_expressions() -> Callable[[str, str], bool | None]:
    """equal(right, answer): whether math-verify finds them equal; None where it cannot read what is right.

    It may take for ever, so whoever calls it needs a limit. Raises RecipeError without math-verify.
    """
    try:
        from math_verify import parse, verify  # an extra that a plain install does not have
    except ImportError as error:
        raise RecipeError('reward math: needs math-verify; install it with pip install "luthier[rl]"') from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off

    def equal(right: str, answer: str) -> bool | None:
        forms = (right, f"${right}$") if _IN_WORDS.search(right) else (f"${right}$", right)
        expected = parse(forms[0], parsing_timeout=None) or parse(forms[1], parsing_timeout=None)
        if not expected:
            return None
        return bool(verify(expected, parse(answer, parsing_timeout=None), timeout_seconds=None))

    return equal


def _numbers(text: str) -> list[Decimal]:
    return [_decimal(found) for found in _NUMBER.finditer(text)]


def _decimal(found: re.Match[str]) -> Decimal:
    sign = "-" if found["sign"] in ("-", "\u2212") else ""
    return Decimal(sign + found["digits"].replace(",", "") + (found["exponent"] or ""))


def _boxed(text: str) -> str:
    r"""What stands in the last \boxed{}, up to its own closing brace; nothing where it is never closed."""
    inside, depth = text.rpartition(_BOXED)[2] if _BOXED in text else "", 1
    for place, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[:place]
    return ""
