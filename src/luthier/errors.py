"""Every error that Luthier raises on purpose.

Each is raised where the offending value is known, with one sentence that says what is wrong, where, and how to mend it.
The command line prints that sentence alone; a traceback appears only with `--debug`.
"""

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "LuthierError",
    "MemoryPlanError",
    "ModelError",
    "NetworkError",
    "RecipeError",
    "TemplateError",
    "TrainingError",
    "VerificationError",
]


class LuthierError(Exception):
    """Something the user can mend; the message says how."""


class RecipeError(LuthierError):
    """A recipe or a flag is wrong: file, line, field, and the nearest valid name."""


class DataError(LuthierError):
    """A row or a data file does not fit: file, line, reason."""


class TemplateError(DataError):
    """A chat template cannot be trained on faithfully: which rule it breaks."""


class ModelError(LuthierError):
    """A model cannot be found, read or written."""


class NetworkError(ModelError):
    """A model or file is not here and the network that has it cannot be reached."""


class AdapterError(LuthierError):
    """An adapter does not fit its model: unknown target, wrong shape, wrong base."""


class TrainingError(LuthierError):
    """A run cannot go on: a loss that is not finite, nothing to train."""


class CheckpointError(LuthierError):
    """A checkpoint is missing, damaged or belongs to another run."""


class MemoryPlanError(LuthierError):
    """The work does not fit into memory: how much is missing and the cheapest change that makes it fit."""


class VerificationError(LuthierError):
    """A promise that was checked does not hold: the numbers that differ."""


class ExportError(LuthierError):
    """An exported artifact is not the model it was made from."""
