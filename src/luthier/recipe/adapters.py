"""Settings of the adapters, one class for each type.

A further type is one class here and one more member of `_Any`; recipes, flags, JSON Schema and the messages about
unknown types follow from that. `adapter: lora`, `adapter: {r: 8}` and `adapter: {type: lora, r: 8}` all mean LoRA.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from luthier.recipe.problems import Problem, Problems, problems_in, unknown
from luthier.recipe.settings import Count, Names, Settings, Word, branches

__all__ = [
    "ADAPTER_SETTINGS",
    "IA3",
    "AdaLoRA",
    "AdapterFusion",
    "AdapterSettings",
    "AnyAdapter",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "DyLoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRank",
    "Prefix",
    "Prompt",
    "VeRA",
]

_DEFAULT_TYPE = "lora"
_OTHER_WORDS = {  # what people call a type that is a setting of another here
    "loftq": "it is type: lora with init: loftq, over quantize_base: nf4",
    "lora+": "it is type: lora with lr_ratio_b: 16",
    "loraplus": "it is type: lora with lr_ratio_b: 16",
    "olora": "it is type: lora with init: olora",
    "p_tuning": "it is type: prompt",
    "pissa": "it is type: lora with init: pissa",
    "qlora": "it is type: lora, or any other, over quantize_base: nf4",
    "rslora": "it is type: lora with rs_scaling: true",
}
_Positive = Annotated[float, Gt(0)]
_Dropout = Annotated[float, Ge(0), Lt(1)]


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f'"{pattern}" is no pattern of layer names ({error})') from None
    return pattern


def _factor(number: int) -> int:
    if number == -1 or number >= 2:
        return number
    raise ValueError(f"expected at least 2, or -1 for the most equal factors, got {number}")


_Pattern = Annotated[Word, AfterValidator(_compiled)]


class AnyAdapter(Settings):
    """What every adapter knows."""

    type: str
    """Which adapter it is."""

    new_tokens: tuple[Word, ...] = ()
    """Tokens that are added to the vocabulary; their rows of embedding and output layer alone are trained."""

    trainable_token_indices: tuple[Annotated[int, Ge(0)], ...] = ()
    """Tokens of the vocabulary whose rows of embedding and output layer are trained, by number. With new_tokens it says
    their numbers, which follow from the tokenizer."""

    modules_to_save: tuple[Word, ...] = ()
    """Modules that are trained whole besides, by the end of their names (`lm_head`), and saved with the adapter."""

    rate_ratio: ClassVar[float] = 1.0  # by which a stage's usual learning rate is multiplied

    @model_validator(mode="after")
    def _name_tokens_once(self) -> Self:
        found = []
        for field in ("new_tokens", "trainable_token_indices"):
            values = getattr(self, field)
            if twice := next((value for i, value in enumerate(values) if value in values[:i]), None):
                found.append(Problem((field,), f"{json.dumps(twice)} stands there twice; leave one out"))
        if self.new_tokens and len(self.trainable_token_indices) not in (0, len(self.new_tokens)):
            found.append(Problem(("trainable_token_indices",), "are not as many as new_tokens; leave it out"))
        if found:
            raise Problems(found)
        return self


class _OnLinear(AnyAdapter):
    """What adapters of linear layers know."""

    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Which linear layers are adapted, by the end of their names; `all-linear` is all but the output layer."""

    layers_to_transform: Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)] | None = None
    """The numbers of the blocks that are adapted, from 0 on; all where not given."""


def _customary_alpha(fields: dict[str, Any]) -> float:
    return 16.0 if fields.get("rs_scaling") else 2.0 * fields.get("r", 0)


class LowRank(_OnLinear):
    """What adapters with a rank know."""

    r: Count = 16
    """The rank of the update."""

    rank_pattern: dict[_Pattern, Count] = Field(default={})
    """Another rank for some layers, by the end of their names: `down_proj: 32`."""

    alpha_pattern: dict[_Pattern, _Positive] = Field(default={})
    """Another alpha for some layers, by the end of their names."""

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its dotted name."""
        return next((r for key, r in self.rank_pattern.items() if _fits(key, layer)), self.r)


def _fits(pattern: str, layer: str) -> bool:
    """As PEFT matches: the pattern is the name's end, after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", layer) is not None


def _alpha_of(settings: Any, layer: str) -> float:
    alphas: dict[str, float] = settings.alpha_pattern
    return next((alpha for key, alpha in alphas.items() if _fits(key, layer)), float(settings.alpha))


class _LoRALike(LowRank):
    """What LoRA and DoRA share."""

    dropout: _Dropout = 0.0
    """The share of the adapter's inputs that is dropped while training."""

    rs_scaling: bool = False
    """Scales by alpha / sqrt(r) instead of alpha / r, so that high ranks learn as fast (Kalajdzievski 2023)."""

    alpha: _Positive = Field(default_factory=_customary_alpha)
    """The update's strength; by default 2 r (Biderman et al. 2024), or 16 with rs_scaling, which grows with r."""

    bias: Literal["all", "lora_only", "none"] = "none"
    """Which biases of the model are trained besides: all, those of the adapted layers, or none."""

    lr_ratio_b: _Positive = 1.0
    """How many times A's learning rate B learns with; LoRA+ (Hayou et al. 2024) takes 16."""

    def scale_of(self, layer: str) -> float:
        """alpha / r of a layer, or alpha / sqrt(r)."""
        r = self.rank_of(layer)
        return _alpha_of(self, layer) / (r**0.5 if self.rs_scaling else r)


class LoRA(_LoRALike):
    """h = W x + (alpha / r) B A x        Hu et al. 2021, section 4.1"""

    type: Literal["lora"] = "lora"
    """Low-rank updates beside the frozen weights."""

    init: Literal["gaussian", "kaiming", "loftq", "olora", "pissa"] = "kaiming"
    """How A and B start: A random and B zero; the largest singular parts of the weight (pissa) or its QR (olora),
    taken off the weight; or what quantizing the base took away (loftq)."""

    iterations: Count = 5
    """How often loftq alternates between quantizing and taking the singular parts."""


class DoRA(_LoRALike):
    """h = m (W + s B A) x / |W + s B A|        Liu et al. 2024, eq. 5"""

    type: Literal["dora"] = "dora"
    """Low-rank updates of the weights' directions, and their magnitudes."""

    init: Literal["gaussian", "kaiming"] = "kaiming"
    """How A starts: uniform after He et al., or normal with deviation 1 / r. B starts at zero in both."""

    lr_ratio_magnitude: _Positive = 1.0
    """How many times A's learning rate the magnitudes learn with."""


class LoHa(LowRank):
    """h = W x + (alpha / r) ((A1 B1) * (A2 B2)) x        Hyeon-Woo et al. 2021 (FedPara), proposition 1"""

    type: Literal["loha"] = "loha"
    """Products of two low-rank updates, element by element: rank up to r squared."""

    r: Count = 8
    """The rank of either factor."""

    alpha: _Positive = Field(default_factory=lambda fields: float(fields.get("r", 0)))
    """The update's strength; r by default."""

    def scale_of(self, layer: str) -> float:
        """alpha / r of a layer."""
        return _alpha_of(self, layer) / self.rank_of(layer)

    rate_ratio: ClassVar[float] = 5.0


class LoKr(LowRank):
    """h = W x + (alpha / r) (C kron D) x        Yeh et al. 2023 (LyCORIS), section 3.2; Edalati et al. 2022"""

    type: Literal["lokr"] = "lokr"
    """Kronecker products of a small matrix and a low-rank one."""

    alpha: _Positive = Field(default_factory=lambda fields: float(fields.get("r", 0)))
    """The update's strength; r by default."""

    decompose_factor: Annotated[int, AfterValidator(_factor)] = -1
    """The size of the small matrix; -1 makes both factors as equal as the layer's sizes allow."""

    decompose_both: bool = False
    """Makes the small matrix a low-rank product too."""

    def scale_of(self, layer: str) -> float:
        """alpha / r of a layer."""
        return _alpha_of(self, layer) / self.rank_of(layer)

    rate_ratio: ClassVar[float] = 5.0


class VeRA(_OnLinear):
    """h = W x + b * B (d * A x)        Kopiczko et al. 2023, eq. 2"""

    type: Literal["vera"] = "vera"
    """One frozen random pair for all layers; only two vectors a layer are trained."""

    r: Count = 256
    """The rank of the shared pair."""

    d_initial: _Positive = 0.1
    """Where the vector d starts; b starts at zero."""

    dropout: _Dropout = 0.0
    """The share of the adapter's inputs that is dropped while training."""

    projection_seed: Annotated[int, Ge(0)] = 0
    """The seed of the shared pair, by which it is made anew instead of being stored."""

    save_projection: bool = False
    """Keeps the shared pair in the adapter's file all the same; PEFT's own files have it."""

    rate_ratio: ClassVar[float] = 25.0


def _customary_feedforward(fields: dict[str, Any]) -> tuple[str, ...]:
    names = fields.get("target_modules", ())
    return ("down_proj",) if names == "all-linear" or "down_proj" in names else ()


class IA3(_OnLinear):
    """h = l * (W x + b); in feed-forward layers h = W (l * x) + b        Liu et al. 2022, section 3.3"""

    type: Literal["ia3"] = "ia3"
    """Learned factors on keys, values and the inside of feed-forward blocks."""

    target_modules: Literal["all-linear"] | Names = ("k_proj", "v_proj", "down_proj")
    """Which linear layers are adapted, by the end of their names; `all-linear` is all but the output layer."""

    feedforward_modules: tuple[Word, ...] = Field(default_factory=_customary_feedforward)
    """Those of them whose input is scaled instead of their output; by default `down_proj` where it is adapted."""

    rate_ratio: ClassVar[float] = 25.0


class AdaLoRA(_OnLinear):
    """h = W x + (alpha / r) B diag(e) A x, the ranks pruned to a budget        Zhang et al. 2023, eq. 3"""

    type: Literal["adalora"] = "adalora"
    """Low-rank updates whose ranks go where they matter."""

    target_r: Count = 8
    """The average rank of a layer at the end."""

    init_r: Count = Field(default_factory=lambda fields: (3 * fields.get("target_r", 0) + 1) // 2)
    """The rank that every layer starts with; by default one and a half times target_r."""

    alpha: _Positive = Field(default_factory=lambda fields: 2.0 * fields.get("init_r", 0))
    """The update's strength; 2 init_r by default."""

    dropout: _Dropout = 0.0
    """The share of the adapter's inputs that is dropped while training."""

    warmup_ratio: Annotated[float, Ge(0), Lt(1)] = 0.1
    """The share of the steps, at the start, in which all ranks stay."""

    final_ratio: Annotated[float, Ge(0), Lt(1)] = 0.3
    """The share of the steps, at the end, in which the ranks stay as they have become."""

    prune_every: Count = 5
    """Steps from one choice of ranks to the next."""

    beta1: Annotated[float, Gt(0), Lt(1)] = 0.85
    """How much of the mean importance is kept a step."""

    beta2: Annotated[float, Gt(0), Lt(1)] = 0.85
    """How much of the importance's mean uncertainty is kept a step."""

    orth_reg_weight: Annotated[float, Ge(0)] = 0.5
    """The weight of |B'B - 1| + |A A' - 1| in the loss, which keeps the factors those of a singular value
    decomposition."""

    rate_ratio: ClassVar[float] = 10.0

    @model_validator(mode="after")
    def _leave_steps_between(self) -> Self:
        found = []
        if self.target_r > self.init_r:
            found.append(Problem(("target_r",), f"{self.target_r} is above init_r, {self.init_r}; ranks only shrink"))
        if self.warmup_ratio + self.final_ratio >= 1:
            found.append(Problem(("final_ratio",), "with warmup_ratio it leaves no step to choose ranks in"))
        if found:
            raise Problems(found)
        return self


class DyLoRA(_OnLinear):
    """h = W x + (alpha / b) B[:, :b] A[:b] x, b drawn each step        Valipour et al. 2023, eq. 5"""

    type: Literal["dylora"] = "dylora"
    """One update that serves at every rank from min_r to r."""

    r: Count = 16
    """The highest rank."""

    min_r: Count = 1
    """The lowest rank that is trained."""

    alpha: _Positive = Field(default_factory=_customary_alpha)
    """The update's strength; 2 r by default."""

    dropout: _Dropout = 0.0
    """The share of the adapter's inputs that is dropped while training."""

    @model_validator(mode="after")
    def _order_ranks(self) -> Self:
        if self.min_r > self.r:
            raise Problems([Problem(("min_r",), f"{self.min_r} is above r, {self.r}; lower it")])
        return self


class Bottleneck(AnyAdapter):
    """y + s (U f(D y + d) + u), after a sublayer or beside it        Houlsby et al. 2019, Pfeiffer et al. 2020"""

    type: Literal["bottleneck"] = "bottleneck"
    """Small networks with a narrow middle after the sublayers of each block."""

    size: Count = 64
    """The width of the middle."""

    after: Literal["attention", "both", "feed_forward"] = "both"
    """After which sublayers: both (Houlsby), or feed_forward alone (Pfeiffer)."""

    parallel: bool = False
    """Reads the sublayer's input instead of its output (He et al. 2022)."""

    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    """The non-linearity f."""

    scale: _Positive = 1.0
    """The strength s."""

    dropout: _Dropout = 0.0
    """The share of the middle that is dropped while training, after the non-linearity."""

    rate_ratio: ClassVar[float] = 2.5


def _bottleneck_settings(text: str) -> str:
    try:
        Bottleneck.model_validate_json(text)
    except ValidationError:
        raise ValueError("not the settings of a bottleneck adapter; leave members out to read them anew") from None
    return text


class AdapterFusion(AnyAdapter):
    """V sum_n w_n z_n, w = softmax_n((Q y)' K z_n), z_n: what bottleneck n makes of y    Pfeiffer et al. 2021, eq. 3"""

    type: Literal["fusion"] = "fusion"
    """Learned attention over bottleneck adapters that were trained before and stay as they are."""

    adapters: Names
    """The folders of two or more bottleneck adapters; once trained, the fusion has them in its own file."""

    members: tuple[Annotated[Word, AfterValidator(_bottleneck_settings)], ...] = ()
    """The settings of each, as JSON; read from their folders where not given, and kept in the fusion's file."""

    rate_ratio: ClassVar[float] = 0.25

    @property
    def bottlenecks(self) -> tuple[Bottleneck, ...]:
        """The members' settings, where they are known."""
        return tuple(Bottleneck.model_validate_json(text) for text in self.members)

    @model_validator(mode="after")
    def _know_all_members_or_none(self) -> Self:
        num_adapters, num_members, found = len(self.adapters), len(self.members), []
        if num_adapters < 2:
            found.append(Problem(("adapters",), "there is nothing to choose from in one; name two folders or more"))
        if num_members not in (0, num_adapters):
            mend = f"there are {num_members} for {num_adapters} adapters; leave them out to read them anew"
            found.append(Problem(("members",), mend))
        if found:
            raise Problems(found)
        return self


def _customary_init(fields: dict[str, Any]) -> Literal["random", "vocabulary"]:
    return "vocabulary" if fields.get("encoder_hidden_size") is None else "random"


class _Virtual(AnyAdapter):
    """What adapters that put something before every text know."""

    num_virtual_tokens: Count = 16
    """How many virtual tokens stand before every text."""

    @model_validator(mode="after")
    def _name_the_text(self) -> Self:
        init, init_text = (getattr(self, name) for name in ("init", "init_text"))
        if (init == "text") != (init_text is not None):
            mend = "init: text needs one" if init == "text" else "it has an effect with init: text alone"
            raise Problems([Problem(("init_text",), mend)])
        return self


class Prefix(_Virtual):
    """softmax(q [P_k; K]') [P_v; V] in every attention layer        Li and Liang 2021, section 4"""

    type: Literal["prefix"] = "prefix"
    """Learned keys and values before those of the text, in every layer."""

    encoder_hidden_size: Count | None = None
    """Makes them by a two-layer network of this width while training, which is steadier; none trains them as such."""

    init: Literal["random", "text", "vocabulary"] = Field(default_factory=_customary_init)
    """How they start: at random, which an encoder always does; or as the model's own for init_text, or for random
    tokens."""

    init_text: Word | None = None
    """The text whose keys and values they start as, repeated or cut to their number."""

    rate_ratio: ClassVar[float] = 50.0

    @model_validator(mode="after")
    def _start_encoders_at_random(self) -> Self:
        if self.encoder_hidden_size is not None and self.init != "random":
            raise Problems([Problem(("init",), "an encoder starts at random; leave init or encoder_hidden_size out")])
        return self


class Prompt(_Virtual):
    """[P; embed(x)]        Lester et al. 2021, section 2"""

    type: Literal["prompt"] = "prompt"
    """Learned embeddings before those of the text."""

    init: Literal["random", "text", "vocabulary"] = "vocabulary"
    """How they start: at random, as the embeddings of init_text, or as those of random tokens."""

    init_text: Word | None = None
    """The text whose embeddings they start as, repeated or cut to their number."""

    rate_ratio: ClassVar[float] = 150.0


class BitFit(AnyAdapter):
    """h = W x + b with b trained alone        Ben Zaken et al. 2021"""

    type: Literal["bitfit"] = "bitfit"
    """Trains biases alone; linear layers that have none get one."""

    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Which linear layers get a bias if they have none, by the end of their names; existing ones are all trained."""

    rate_ratio: ClassVar[float] = 25.0


_OnLinearLayers: TypeAlias = LoRA | DoRA | LoHa | LoKr | VeRA | IA3 | AdaLoRA | DyLoRA | BitFit
_Any: TypeAlias = _OnLinearLayers | Bottleneck | AdapterFusion | Prefix | Prompt

ADAPTER_SETTINGS: dict[str, type[AnyAdapter]] = {kind.model_fields["type"].default: kind for kind in branches(_Any)}


def _by_type(value: object) -> object:
    """Settings of the class that `type` names; raises Problems."""
    fields = {"type": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        return value
    kind = str(fields.get("type", _DEFAULT_TYPE))
    if kind not in ADAPTER_SETTINGS:
        path = ("type",) if fields is value else ()
        other = _OTHER_WORDS.get(kind.lower())
        sentence = f'unknown type "{kind}"; {other}' if other else unknown("type", kind, list(ADAPTER_SETTINGS))
        raise Problems([Problem(path, sentence)])
    try:
        return ADAPTER_SETTINGS[kind].model_validate(dict(fields))
    except ValidationError as error:
        raise Problems(problems_in(error, fields)) from None


AdapterSettings = Annotated[_Any, BeforeValidator(_by_type)]
