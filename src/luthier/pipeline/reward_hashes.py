"""What rewards are made of besides their settings: the files and the weights that these name, as digests."""

from pathlib import Path

from luthier.adapters.peft_files import CONFIG, WEIGHTS
from luthier.files import file_hash
from luthier.models.sources import resolve
from luthier.recipe.rewards import AnyReward, FunctionReward, JsonReward, ModelReward

__all__ = ["reward_hashes"]


def reward_hashes(part: AnyReward) -> dict[str, str]:
    """SHA-256 of a function's file, a schema, a reward model's weights and its adapter, by their names. None of a file
    that is not there, which is complained of where it is read. Raises ModelError where a model cannot be found.
    """
    match part:
        case FunctionReward():
            return _hashed(Path(part.function.rpartition(":")[0]))
        case JsonReward(schema_file=str(file)):
            return _hashed(Path(file))
        case ModelReward():
            found = {} if part.model is None else {part.model: resolve(part.model).weights_hash}
            return (
                found if part.adapter is None else found | _hashed(*(Path(part.adapter, n) for n in (CONFIG, WEIGHTS)))
            )
    return {}


def _hashed(*files: Path) -> dict[str, str]:
    return {str(file): file_hash(file) for file in files if file.is_file()}
