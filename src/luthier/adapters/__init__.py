"""Adapters: small modules that change a frozen layer by two formulas, `forward(x, base)` and `merge(weight, bias)`."""
