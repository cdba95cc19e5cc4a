"""AdapterFusion: attention, learned at each place, over bottleneck adapters that were trained before.

The members are buffers, not parameters: they are saved and restored with the fusion, and nothing trains them. A fusion
that is read from a file has them from there; a new one reads them from their folders.
What each member makes of a token is never formed. Scores and sums are linear in it, so the query goes down into the
members' middles, and the weighted middles come up together, in as many products as for one wide bottleneck.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.adapters.adapted import Base
from luthier.adapters.base import Adapter, Start
from luthier.adapters.bottleneck import Bottleneck, sublayer_input, sublayers, with_output
from luthier.adapters.peft_files import OWN_FIELD, WEIGHTS, opened, read_config
from luthier.adapters.starts import gaussian
from luthier.errors import AdapterError, RecipeError
from luthier.kernels.activations import ACTIVATIONS
from luthier.kernels.linear import linear
from luthier.recipe.adapters import AnyAdapter
from luthier.recipe.adapters import Bottleneck as Member
from luthier.recipe.settings import settings_from

__all__ = ["AdapterFusion"]

_KIND = "LUTHIER_BOTTLENECK"
_START_STD = 0.02  # of Q and K: the scores start near zero, and yet with a gradient


class AdapterFusion(Adapter):
    """(1 + V) sum_n w_n z_n,  w = softmax over n of (Q y)' (K z_n)        Pfeiffer et al. 2021 (AdapterFusion), eq. 3

    y: [..., hidden], what the sublayer gives. z_n = y + s_n (U_n f_n(D_n y + d_n) + u_n), what member n makes of it.
    Q, K and V are [hidden, hidden]. The paper's value matrix is 1 + V: V starts at zero, so that the fusion starts as
    the members' average but for small scores, and weight decay draws to the identity, as the paper's penalty does.
    """

    file_names: ClassVar[Mapping[str, str]] = {
        **{"fusion_query": "query.weight", "fusion_key": "key.weight", "fusion_value": "value.weight"},
        **{"down": "members.down.weight", "down_bias": "members.down.bias"},
        **{"up": "members.up.weight", "up_bias": "members.up.bias"},
    }
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    @classmethod
    def places(cls, network: nn.Module, settings: Any) -> dict[str, nn.Module]:
        return sublayers(network, _members(settings)[0].after)

    @property
    def sees_rows(self) -> bool:
        return False

    def create(self) -> None:
        """The members lie side by side, one middle after the other, with s_n in U_n and u_n."""
        self.members = _members(self.settings)
        words = tuple(member.model_dump_json() for member in self.members)
        self.settings = self.settings.model_copy(update={"members": words})
        self.sizes = [member.size for member in self.members]
        hidden, width = self.config.hidden_size, sum(self.sizes)  # type: ignore[union-attr]
        self.fusion_query = Parameter(torch.zeros(hidden, hidden, device=self.device))
        self.fusion_key = Parameter(torch.zeros(hidden, hidden, device=self.device))
        self.fusion_value = Parameter(torch.zeros(hidden, hidden, device=self.device))
        self.register_buffer("down", torch.zeros(width, hidden, device=self.device))
        self.register_buffer("down_bias", torch.zeros(width, device=self.device))
        self.register_buffer("up", torch.zeros(hidden, width, device=self.device))
        self.register_buffer("up_bias", torch.zeros(len(self.members), hidden, device=self.device))

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """Q and K normal with deviation 0.02, V zero; the members from their folders. Raises AdapterError for a folder
        that has none for this place.
        """
        for matrix in (self.fusion_query, self.fusion_key):
            matrix.copy_(gaussian(tuple(matrix.shape), _START_STD, start.generator))
        downs, down_biases = self.down.split(self.sizes), self.down_bias.split(self.sizes)
        ups, up_biases = self.up.split(self.sizes, dim=1), self.up_bias.unbind()
        for i, (folder, member) in enumerate(zip(self.settings.adapters, self.members, strict=True)):
            stored = {"adapter_down": downs[i], "adapter_down_bias": down_biases[i]}
            _copy_stored(Path(folder), self.name, stored, scale=1.0)
            stored = {"adapter_up": ups[i], "adapter_up_bias": up_biases[i]}
            _copy_stored(Path(folder), self.name, stored, scale=member.scale)

    def saved(self) -> dict[str, Tensor]:
        return super().saved() | {self.key(name): buffer for name, buffer in self.named_buffers()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        super().fill(tensors)
        for name, buffer in self.named_buffers():
            buffer.copy_(tensors[self.key(name)])

    def forward(self, *inputs: Any, base: Base, **options: Any) -> Any:
        result = base(*inputs, **options)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        y = output.flatten(0, -2)
        x = sublayer_input(self.name, inputs, options).flatten(0, -2) if self.members[0].parallel else y
        middles = self.middles(x)
        weights = self.weights(y, middles)
        dtype, owners = y.dtype, self._owners(y)
        mixed = torch.addmm(y, weights, self.up_bias.to(dtype))
        mixed = mixed.add_(linear(middles * (weights @ owners.T), self.up.to(dtype)))
        valued = linear(mixed, self.fusion_value.to(dtype)).add_(mixed)
        return with_output(result, valued.view(output.shape))

    def middles(self, x: Tensor) -> Tensor:
        """f_n(D_n x + d_n) of all members, side by side. x: [tokens, hidden] -> [tokens, sum of sizes]."""
        inner: Tensor = linear(x, self.down.to(x.dtype), self.down_bias.to(x.dtype))
        kinds = [ACTIVATIONS[member.activation][0] for member in self.members]
        if len(set(kinds)) == 1:
            return kinds[0](inner)
        return torch.cat([f(part) for f, part in zip(kinds, inner.split(self.sizes, dim=1), strict=True)], dim=1)

    def weights(self, y: Tensor, middles: Tensor) -> Tensor:
        """w, [tokens, members]: what of the output each member makes, adding up to one for every token.

        (Q y)' K z_n is taken as (K' Q y)' z_n, and y's own part of z_n left out: it is the same for all members.
        """
        query = linear(linear(y, self.fusion_query.to(y.dtype)), self.fusion_key.to(y.dtype).T)
        within: Tensor = linear(query, self.up.to(y.dtype).T) * middles
        scores = torch.addmm(query @ self.up_bias.to(y.dtype).T, within, self._owners(y))
        weights: Tensor = scores.softmax(-1)
        return weights

    def _owners(self, like: Tensor) -> Tensor:
        """[sum of sizes, members]: one where a part of the middles belongs to a member, else zero."""
        owners: Tensor = torch.block_diag(*[like.new_ones(size, 1) for size in self.sizes])
        return owners


def _members(settings: Any) -> tuple[Member, ...]:
    """The members' settings, as kept or from their folders. Raises AdapterError where they cannot stand together."""
    members = settings.bottlenecks or tuple(_read_settings(Path(folder)) for folder in settings.adapters)
    first: Member = members[0]
    for folder, member in zip(settings.adapters, members, strict=True):
        for word in ("after", "parallel"):
            if getattr(member, word) != getattr(first, word):
                raise AdapterError(
                    f"{folder}: its {word} is {getattr(member, word)} and that of {settings.adapters[0]} "
                    f"{getattr(first, word)}; fuse adapters that sit on the same places"
                )
    return tuple(members)


def _read_settings(folder: Path) -> Member:
    config = read_config(folder)
    if config.get("peft_type") != _KIND:
        raise AdapterError(f"{folder}: holds an adapter of type {config.get('peft_type')}; only bottlenecks are fused")
    try:
        settings = settings_from(Member, config[OWN_FIELD])
    except (ValueError, TypeError, KeyError, RecipeError) as error:
        raise AdapterError(
            f"{folder}: no bottleneck adapter that can be read ({error}); name the folder of one"
        ) from error
    if beside := _beside(settings):
        raise AdapterError(f"{folder}: was trained with {beside} besides, which cannot be fused; train it without")
    return settings


def _beside(settings: AnyAdapter) -> str:
    """What every adapter may train besides its own, as far as these settings ask for it."""
    return ", ".join(word for word in AnyAdapter.model_fields if word != "type" and getattr(settings, word))


def _copy_stored(folder: Path, place: str, into: Mapping[str, Tensor], *, scale: float) -> None:
    """Fills these with a stored bottleneck's parameters, times scale. By numpy, which a plan's tensors can read."""
    for name, target in into.items():
        key = f"base_model.model.{place}.{Bottleneck.file_names[name]}"
        with opened(folder / WEIGHTS, "np") as file:
            if key not in file.keys():  # noqa: SIM118, the file is no dict
                raise AdapterError(f"{folder}: {key} is not there; made for another model")
            values = torch.from_numpy(file.get_tensor(key))
        if values.shape != target.shape:
            raise AdapterError(
                f"{folder}: made for another model: {key} is {tuple(values.shape)}, here {tuple(target.shape)}"
            )
        target.copy_(values * scale)
