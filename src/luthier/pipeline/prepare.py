"""A stage's data and network made ready: rows encoded, layers fused, frozen and adapted, the optimizer's start.

The memory plan goes through the same functions with a network that has no weights, so it plans what will run.
"""

import logging
from functools import partial
from pathlib import Path

from torch import Tensor

from luthier.adapters.base import Adapter
from luthier.adapters.inject import DEFAULT_NAME, inject
from luthier.adapters.new_tokens import numbered, with_tokens
from luthier.adapters.switch import activate
from luthier.data.prepare import Prepared, prepare
from luthier.errors import RecipeError
from luthier.kernels.float8_linear import has_float8_product
from luthier.models.float8 import in_float8
from luthier.models.fuse import fuse
from luthier.models.heads import with_head, with_trained_head
from luthier.models.load import Model, gives_rewards, load_either
from luthier.models.quantize import quantize_base
from luthier.models.recompute import checkpoint_layers
from luthier.models.trainable import freeze_base, train_all_but
from luthier.models.values import add_value_head
from luthier.pipeline.policy import CRITIC
from luthier.pipeline.prompts import prepare_prompts
from luthier.quant.linear import round_trip
from luthier.recipe.adapters import AnyAdapter
from luthier.recipe.policy import PPO, OnPolicy
from luthier.recipe.preference import RewardModel
from luthier.recipe.training import OnChats, Training
from luthier.training.offload_state import keep_in
from luthier.training.optimizers import make_optimizer
from luthier.training.precision import Precision, float32_masters
from luthier.training.state import Progress, TrainState

__all__ = ["adapt", "fresh_state", "prepare_data", "prepare_network", "set_template"]

logger = logging.getLogger(__name__)


def prepare_data(settings: Training, model: Model, folder: Path) -> Prepared:
    """The stage's sequences, with the template and the new tokens that the settings name. The model's tokenizer becomes
    a copy where it gets new tokens.
    """
    model.tokenizer = with_tokens(model.tokenizer, () if settings.adapter is None else settings.adapter.new_tokens)
    set_template(model, settings)
    if isinstance(settings, OnPolicy):
        return prepare_prompts(settings, model.tokenizer, quarantine=folder / "quarantine.jsonl")
    stops = model.network.generation_config.eos_token_id
    return prepare(
        settings,
        model.tokenizer,
        eos_token_ids=stops if isinstance(stops, list) else [stops],
        padding_id=model.config.get_text_config().pad_token_id if gives_rewards(model.config) else None,
        quarantine=folder / "quarantine.jsonl",
    )


def set_template(model: Model, settings: Training) -> None:
    """Gives the model's tokenizer the chat template that the settings name. Raises RecipeError."""
    if isinstance(settings, OnChats) and settings.chat_template is not None:
        model.tokenizer.chat_template = _read_template(Path(settings.chat_template))


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (
            "is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
        )
        raise RecipeError(f"chat_template: {path} {reason}; name a Jinja file, from {Path.cwd()} on") from error


def prepare_network(settings: Training, model: Model) -> list[Adapter]:
    """Freezes, fuses, adapts and quantizes the network as the settings say, and lets it multiply in eight bits; returns
    the adapters. A reward model's gets a head first, which is trained whole.
    """
    if isinstance(settings, RewardModel):
        headed = with_head(model, seed=settings.seed)
        model.network, model.tokenizer = headed.network, headed.tokenizer
    fusion = fuse(model.network)
    for name, count in fusion.kept.items():
        logger.info("%d %s differ from the fused form and run as they are", count, name)
    adapters: list[Adapter] = []
    if settings.adapter is None:
        train_all_but(model.network, settings.freeze)
    else:
        scheme = settings.quantize_base
        wanted = with_trained_head(settings.adapter) if isinstance(settings, RewardModel) else settings.adapter
        adapters = adapt(model, wanted, seed=settings.seed, scheme=scheme)
        if scheme:
            quantize_base(model.network, scheme)
    if isinstance(settings, PPO):
        adapters += _with_critic(settings, model)
    checkpoint_layers(model.network, settings.gradient_checkpointing)
    if settings.fp8 is not None:
        how = "" if has_float8_product(model.device) else ", emulated on this device: slower than without"
        logger.info("%d linear layers multiply in eight bits%s", in_float8(model.network, settings.fp8), how)
    model.network.train()
    return adapters


def _with_critic(settings: PPO, model: Model) -> list[Adapter]:
    """Gives the network a value head, and where that has a trunk of its own an adapter for it, which is returned."""
    critic: list[Adapter] = []
    if settings.value_trunk == "own":
        assert settings.adapter is not None, "a trunk of its own is an adapter"
        critic = adapt(model, settings.adapter, seed=settings.seed + 1, name=CRITIC)
        activate(model.network, DEFAULT_NAME)
    add_value_head(model.network)
    return critic


def adapt(
    model: Model, settings: AnyAdapter, *, seed: int, name: str = DEFAULT_NAME, scheme: str | None = None
) -> list[Adapter]:
    """Puts a new adapter on the model, whose base is frozen; returns its parts.

    scheme: how the base is going to be quantized. New tokens get the tokenizer's numbers, and texts are encoded without
    special tokens. Raises AdapterError for what does not fit the model, RecipeError for what does not fit its
    tokenizer, with the model as it was.
    """
    adapters = inject(
        model.network,
        numbered(settings, model.network, model.tokenizer),
        seed=seed,
        name=name,
        rounding=partial(round_trip, scheme=scheme) if scheme else None,
        encode=partial(model.tokenizer.encode, add_special_tokens=False),
    )
    freeze_base(model.network)
    return adapters


def fresh_state(settings: Training, model: Model, *, outline: bool = False) -> TrainState:
    """Where training starts. A model that is trained itself in a narrow type starts from its weights as stored.

    outline: the model has no weights, none are read, and all lies beside it.
    """
    stored: dict[str, Tensor] = {}
    if settings.adapter is None and settings.dtype != "fp32" and not outline:
        wide = load_either(str(model.source.folder), dtype="fp32", device=model.device)
        if isinstance(settings, RewardModel):
            wide = with_head(wide, seed=settings.seed)
        stored = dict(wide.network.named_parameters())
    keep = None if outline else keep_in(settings.offload_optimizer, Path(settings.output), model.device)
    elsewhere = keep is not None and model.device.type != "cpu"
    precision = Precision(float32_masters(model.network, stored, keep=keep, every=elsewhere))
    optimizer = make_optimizer(model.network, settings, precision, keep=keep)
    return TrainState(model.network, optimizer, Progress(), precision)
