"""What is measured in micro-batches, added up on the device and read once for all of a step."""

from torch import Tensor

from luthier.objectives.loss import DIFFERENCES

__all__ = ["add_up", "read"]


def add_up(totals: dict[str, Tensor], further: dict[str, Tensor]) -> None:
    """Adds what was measured to what was before, by name."""
    for name, value in further.items():
        totals[name] = totals[name] + value if name in totals else value


def read(measured: dict[str, Tensor]) -> dict[str, float]:
    """Numbers as they are, and sums with their number as means; what nothing was measured of is left out."""
    numbers: dict[str, float] = {}
    for name, value in measured.items():
        total, number = value.tolist() if value.ndim else (float(value), 1.0)
        if number:
            numbers[name] = total / number
    for name, (one, other) in DIFFERENCES.items():
        if {one, other} <= numbers.keys():
            numbers.setdefault(name, numbers[one] - numbers[other])
    return numbers
