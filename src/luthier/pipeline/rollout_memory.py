"""What sampling holds besides the model: weights in few bytes, which stay, and keys and values while answers are made.

While answers are made there are no gradients and no activations, so only what goes beyond those raises a stage's peak.
"""

from transformers import PreTrainedModel

from luthier.adapters.adapted import bare
from luthier.adapters.targets import Linear, named_places
from luthier.models.load import Model
from luthier.models.packed import can_pack, stored_bytes
from luthier.recipe.policy import OnPolicy
from luthier.recipe.sampling import AnswerSampling

__all__ = ["rollout_bytes", "weights_of"]


def weights_of(settings: OnPolicy | AnswerSampling, network: PreTrainedModel) -> str:
    """How linear layers are stored while sampling: dense, fp16 or int8."""
    if settings.rollout_weights != "auto":
        return settings.rollout_weights
    return "fp16" if can_pack(network) else "dense"


def rollout_bytes(settings: OnPolicy, model: Model, *, longest_prompt: int, step_bytes: int) -> int:
    """What sampling adds to a stage's peak. longest_prompt: in tokens. step_bytes: what only learning holds."""
    if settings.server is not None:
        return 0
    form = weights_of(settings, model.network)
    places = [bare(place) for _, place in named_places(model.network)]
    shapes = [(one.out_features, one.in_features) for one in places if isinstance(one, Linear)]
    merged = form == "dense" and settings.adapter is not None  # the originals are kept beside
    rows = min(settings.rollout_rows, settings.batch_size * settings.minibatches * settings.group_size)
    num_tokens = rows * settings.max_new_tokens + -(-rows // settings.group_size) * longest_prompt
    num_merged = merged * sum(outputs * inputs for outputs, inputs in shapes)
    while_sampling = num_tokens * _bytes_of_keys(model) + num_merged * model.dtype.itemsize
    return sum(stored_bytes(form, *shape) for shape in shapes) + max(0, while_sampling - step_bytes)


def _bytes_of_keys(model: Model) -> int:
    """Of a token's keys and values in all layers."""
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    head_size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads: int = getattr(config, "num_key_value_heads", None) or heads
    num_layers: int = config.num_hidden_layers
    return 2 * num_layers * key_heads * head_size * model.dtype.itemsize
