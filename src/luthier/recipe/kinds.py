"""Settings of several kinds in one field, told apart by the word under `type`.

Pydantic's own discriminated unions would do, but for their messages: here an unknown word is answered with the nearest
known one, and the errors of the chosen kind are the user's fields and nothing of the union.
"""

from collections.abc import Mapping

from pydantic import ValidationError

from luthier.recipe.problems import Problem, Problems, problems_in, unknown
from luthier.recipe.settings import Settings

__all__ = ["by_type"]


def by_type(
    value: object,
    kinds: Mapping[str, type[Settings]],
    *,
    default: str | None = None,
    other_words: Mapping[str, str] | None = None,
) -> object:
    """Settings of the kind that `type` names: `rule`, or `{type: rule, ...}`. What is neither is left to pydantic.

    default: the kind of settings that say no type. other_words: by what people call a kind that has another name here,
    in small letters, how to say it. Raises Problems.
    """
    fields = {"type": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        return value
    if default is None and "type" not in fields:
        raise Problems([Problem(("type",), f"is required; it is one of {', '.join(kinds)}")])
    kind = str(fields.get("type", default))
    if kind not in kinds:
        other = (other_words or {}).get(kind.lower())
        sentence = f'unknown type "{kind}"; {other}' if other else unknown("type", kind, list(kinds))
        raise Problems([Problem(("type",) if fields is value else (), sentence)])
    try:
        return kinds[kind].model_validate(dict(fields))
    except ValidationError as error:
        raise Problems(problems_in(error, fields)) from None
