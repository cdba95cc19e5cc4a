"""Settings of the adapters that train vectors, sublayers or tokens: no update of theirs has a rank."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from luthier.recipe.adapter import AnyAdapter, Dropout, OnLinear, Positive
from luthier.recipe.problems import Problem, Problems
from luthier.recipe.settings import Count, Names, Word

__all__ = ["IA3", "AdapterFusion", "BitFit", "Bottleneck", "Prefix", "Prompt"]


def _customary_feedforward(fields: dict[str, Any]) -> tuple[str, ...]:
    names = fields.get("target_modules", ())
    return ("down_proj",) if names == "all-linear" or "down_proj" in names else ()


class IA3(OnLinear):
    """h = l * (W x + b); in feed-forward layers h = W (l * x) + b        Liu et al. 2022, section 3.3"""

    type: Literal["ia3"] = "ia3"
    """Learned factors on keys, values and the inside of feed-forward blocks."""

    target_modules: Literal["all-linear"] | Names = ("k_proj", "v_proj", "down_proj")
    """Which linear layers are adapted, by the end of their names; `all-linear` is all but the output layer."""

    feedforward_modules: tuple[Word, ...] = Field(default_factory=_customary_feedforward)
    """Those of them whose input is scaled instead of their output; by default `down_proj` where it is adapted."""

    rate_ratio: ClassVar[float] = 25.0


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

    scale: Positive = 1.0
    """The strength s."""

    dropout: Dropout = 0.0
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

    @property
    def rate_ratio(self) -> float:  # type: ignore[override]
        """An encoder of many weights moves the prefix far with each step: at 50 it diverged within ten."""
        return 50.0 if self.encoder_hidden_size is None else 5.0

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
