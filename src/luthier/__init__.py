"""Luthier: fine-tune, align, compress, evaluate and serve language models from one recipe."""

__version__ = "0.1.0"
