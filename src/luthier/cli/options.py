"""click's options made from settings: a field of the recipe is a flag of the same name."""

from typing import Any

import click

from luthier.recipe.flags import Flag, flags_of, settings_from_flags
from luthier.recipe.training import Training

__all__ = ["settings_of", "settings_options"]


def settings_options(cls: type[Training]) -> list[click.Option]:
    """One option for each field, nested ones dotted. Values stay text: the settings read and check them."""
    return [_option(flag) for flag in flags_of(cls)]


def settings_of(cls: type[Training], given: dict[str, Any]) -> Training:
    """The settings that click's values make. Raises RecipeError naming the flag."""
    return settings_from_flags(cls, {flag.name: given[_variable(flag)] for flag in flags_of(cls)})


def _variable(flag: Flag) -> str:
    return "_".join(("flag", *flag.path))


def _option(flag: Flag) -> click.Option:
    names = f"{flag.name}/{flag.negative}" if flag.negative else flag.name
    shown = "" if flag.default in (None, (), {}, "") else f" [default: {_plain(flag.default)}]"
    return click.Option(
        [names, _variable(flag)],
        default=None,
        multiple=flag.multiple,
        type=bool if flag.negative else click.Choice(flag.choices) if flag.choices else str,
        help=f"{flag.help}{shown}",
        metavar=None if flag.choices or flag.negative else "VALUE",
    )


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
