"""Values that cross from one process to another: plain ones by copy, all else as the number of an object.

Only None, truth values, numbers, texts, bytes, lists, tuples, sets and dictionaries are copied, and always as exactly
those: an object of the sender's own class, whatever it says of its equality, never arrives as more than a number.
"""

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["pack", "unpack"]

_SEVERAL: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def pack(value: object, keep: Callable[[object], int]) -> Any:
    """The value in terms of JSON. keep: the number under which an object that is not plain can be asked for."""
    match value:
        case None | bool():
            return value
        case int():
            return int(value)
        case float():
            return float(value)
        case str():
            return str(value)
        case bytes():
            return ["bytes", value.hex()]
        case complex():
            return ["complex", value.real, value.imag]
        case dict():
            return ["dict", *([pack(key, keep), pack(entry, keep)] for key, entry in value.items())]
    for name, kind in _SEVERAL.items():
        if isinstance(value, kind):
            return [name, *(pack(entry, keep) for entry in _entries(value))]
    return ["object", keep(value)]


def unpack(packed: Any, find: Callable[[int], object]) -> Any:
    """The value again. find: what stands for the object of this number. Raises ValueError for what is not packed."""
    match packed:
        case None | bool() | int() | float() | str():
            return packed
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["complex", float(real), float(imaginary)]:
            return complex(real, imaginary)
        case ["dict", *pairs]:
            return {unpack(key, find): unpack(entry, find) for key, entry in pairs}
        case ["object", int(number)]:
            return find(number)
        case [str(name), *entries] if name in _SEVERAL:
            return _SEVERAL[name](unpack(entry, find) for entry in entries)
    raise ValueError("not a value that was packed")


def _entries(value: object) -> Iterable[object]:
    assert isinstance(value, Iterable)
    return value
