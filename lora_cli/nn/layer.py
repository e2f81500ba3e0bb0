"""What all LoRA layers share: a frozen layer, and named adapters beside it.

With the scale s = alpha/r (Hu et al. 2021) or alpha/√r, an adapter adds s·B·A·x to what the frozen layer gives. With
DoRA (Liu et al. 2024) the layer gives g·(W + s·B·A)·x, where g = m / ‖W + s·B·A‖ for each output and the norm gets no
gradient, as section 4.3 of that paper has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.errors import NamesError, NumericError, UnsupportedError, UsageError
from lora_cli.nn import exact
from lora_cli.nn.factors import DEFAULT, Factors
from lora_cli.nn.kinds import KindOfLayer
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.starts import Start


class LoRALayer(KindOfLayer):
    """A layer with adapters beside it.

    Keys of its state: those of the frozen layer under `base.`, and for each adapter `lora_A.weight`, `lora_B.weight`
    and with DoRA `lora_magnitude.weight`; an adapter that is not called `default` has its name before `weight`.

    What the frozen layer has and this one has not (`in_features`, `num_heads`, …) is found here too. `weight` is what
    the layer computes with, adapters included, so that code which multiplies by a layer's weight itself is right.

    Args:
        base: The layer. Its parameters are frozen.
        parameters: Of the first adapter; none is added without them.
        name: Of the first adapter.
        start: How the first adapter begins.

    Attributes:
        base: The frozen layer.
        lora_A: First factors: (rank × in) for a matrix.
        lora_B: Second factors: (out × rank) for a matrix.
        lora_magnitude: Lengths of the outputs' weights, for adapters with DoRA.
        settings: Parameters by adapter.
        active: Adapters in use, each with its weight.
        enabled: Whether adapters are used at all.
    """

    def __init__(
        self,
        base: nn.Module,
        parameters: LoRAParameters | None = None,
        *,
        name: str = DEFAULT,
        start: Start | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self._check_base()
        base.requires_grad_(False)
        self.lora_A, self.lora_B, self.lora_magnitude = Factors(), Factors(), Factors()
        self.dropout = nn.ModuleDict()
        self.settings: dict[str, LoRAParameters] = {}
        self.active: dict[str, float] = {}
        self.enabled = True
        self.train(base.training)
        if parameters is not None:
            self.add_adapter(name, parameters, start=start)

    # Adapters

    def add_adapter(self, name: str, parameters: LoRAParameters, *, start: Start | None = None) -> None:
        """Put an adapter beside the layer and use it. It changes nothing yet, since the product of its factors is zero.

        Raises:
            UsageError: The layer is merged.
            NamesError: There is such an adapter.
            UnsupportedError: This kind of layer does not take it.
            NumericError: With DoRA, an output whose weights are all zero.
        """
        self._refuse_while_merged("take a new adapter")
        self._check_parameters(parameters)
        self._check_mix(self.active | {name: 1.0}, self.settings | {name: parameters})
        start = start or Start.drawn()
        for factors, tensor in self._fresh(parameters, start):
            factors.put(name, tensor)
        self.settings[name] = parameters
        dropout = nn.Dropout(parameters.dropout) if parameters.dropout else nn.Identity()
        self.dropout[name] = dropout.train(self.training)
        self._use(self.active | {name: 1.0})
        if start.principal:
            try:
                self._take_off(name)
            except BaseException:
                self.remove_adapter(name)
                raise

    def reset_parameters(self, name: str = DEFAULT, start: Start | None = None) -> None:
        """Begin an adapter anew, in place: A drawn, B zero, and with DoRA the magnitudes of the frozen weight.

        Raises:
            NamesError: There is none of this name.
            UsageError: The layer is merged, or the init is one that changes the base.
        """
        self._refuse_while_merged("begin anew")
        self._check_known([name])
        start = start or Start.drawn()
        if start.principal or name in self._taken:
            raise UsageError("An adapter that took its factors from the weight cannot begin anew", found=name)
        with torch.no_grad():
            for factors, tensor in self._fresh(self.settings[name], start):
                factors[name].copy_(tensor)

    def _fresh(self, parameters: LoRAParameters, start: Start) -> list[tuple[Factors, Tensor]]:
        """What a new adapter consists of. Magnitudes are not kept in 16 bits, or it would change the layer already."""
        weight = self.base_weight.detach()
        dtype = parameters.dtype or weight.dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            dtype = torch.float32
        a, b = (factor.to(weight.device) for factor in start.factors(self, parameters, dtype))
        if not parameters.dora:
            return [(self.lora_A, a), (self.lora_B, b)]
        norms = self.output_norms(weight.to(torch.promote_types(dtype, torch.float32)))
        if bool((norms == 0).any()):
            found = f"{int((norms == 0).sum())} with zeros only"
            raise NumericError("DoRA needs weights other than zero for each output", found=found)
        return [(self.lora_A, a), (self.lora_B, b), (self.lora_magnitude, norms)]

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away, and give the weight back what its init took off it.

        Raises:
            NamesError: There is none of this name.
            UsageError: The layer is merged.
            WrongInputError: Its init took something off the weight, which was changed since: by another such adapter,
                which is to be removed first, or by hand.
        """
        self.check_removable(name)
        if name in self._taken:
            self._give_back(name)
        for factors in (self.lora_A, self.lora_B, self.lora_magnitude):
            if name in factors:
                factors.remove(name)
        del self.settings[name], self.dropout[name]
        self._use({other: weight for other, weight in self.active.items() if other != name})

    def check_removable(self, name: str) -> None:
        """Refuse what `remove_adapter` refuses, and change nothing."""
        self._refuse_while_merged("lose an adapter")
        self._check_known([name])
        if name in self._taken:
            exact.check_unchanged(self.base_weight, self._taken[name])

    def activate(self, weights: Mapping[str, float]) -> None:
        """Use exactly these adapters, each with its weight.

        Raises:
            NamesError: An adapter that is not here.
            UnsupportedError: A weight other than 1, or another adapter, beside one with DoRA: these do not add up.
                Another weight than 1 for an adapter that took its factors from the weight, which lacks their product.
            UsageError: The layer is merged.
        """
        self.check_weights(weights)
        self._use(weights)

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Refuse what `activate` refuses, and change nothing."""
        self._refuse_while_merged("change its adapters")
        self._check_known(weights)
        self._check_mix(weights, self.settings)
        wrong = [name for name in self._taken if weights.get(name) != 1]
        if wrong:
            raise UnsupportedError(
                "An adapter that took its factors from the weight is used at weight 1",
                found=", ".join(f"{name} at {weights.get(name, 0):g}" for name in wrong),
                hint="save it and load it onto the base as it was: then it can have any weight",
            )

    @staticmethod
    def _check_mix(weights: Mapping[str, float], settings: Mapping[str, LoRAParameters]) -> None:
        with_dora = [name for name in weights if settings[name].dora]
        if with_dora and (len(weights) > 1 or weights[with_dora[0]] != 1):
            raise UnsupportedError(
                "An adapter with DoRA is used alone and at weight 1",
                found=", ".join(f"{name} at {weight:g}" for name, weight in weights.items()),
                hint="before another adapter is added, stop using what is here",
            )

    def _use(self, weights: Mapping[str, float]) -> None:
        self.active = {name: float(weight) for name, weight in weights.items()}
        # Scales are exact fractions, rounded once; a compiled forward sees the numbers alone.
        self._scales = {name: self.settings[name].scale.times(weight) for name, weight in self.active.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute with the frozen layer alone for a while; of a merged layer that is the merged one."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _check_known(self, names: Sequence[str] | Mapping[str, float]) -> None:
        lost = [name for name in names if name not in self.settings]
        if lost:
            there = ", ".join(self.settings) or "none is here"
            raise NamesError("No such adapter", found=", ".join(lost), expected=there)

    # Computing

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Return what the frozen layer gives, and what the active adapters add."""
        result: Tensor = self.base(x, *rest)
        if self.enabled and not self.merged:
            plain = result
            for name in self.active:
                result = result + self._branch(name, plain, x, *rest).to(plain.dtype)
        elif not self.merged:
            for a, b, scale in self._missing():
                result = result + (self.low_rank(x, a, b, *rest) * scale).to(result.dtype)
        return result

    def _missing(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """What inits took off the frozen weight, so that without adapters the layer gives what it gave before them."""
        for term in self.taken_off:
            (a_shape, b_shape), weight = self.shapes(term.a.shape[0]), self.base_weight
            yield term.a.to(weight.device).view(a_shape), term.b.to(weight.device).view(b_shape), -term.scale

    def delta(self, x: Tensor, *rest: Any) -> Tensor:
        """Return what the active adapters alone add to the layer's output."""
        plain = self.base(x, *rest) if any(p.dora for p in self.settings.values()) else None
        parts = [self._branch(name, plain, x, *rest) for name in self.active]
        if not parts:
            raise UsageError("No adapter is active, so there is no delta")
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _branch(self, name: str, plain: Tensor | None, x: Tensor, *rest: Any) -> Tensor:
        parameters, dropout = self.settings[name], self.dropout[name]
        dropped = dropout(x) if x.is_floating_point() else x
        added = self.low_rank(dropped, self.lora_A[name], self.lora_B[name], *rest) * self._scales[name]
        if not parameters.dora:
            return added
        # What dropout leaves out is left out of W·x too, as the adapter stands for all of W' - W.
        if plain is None or (self.training and parameters.dropout > 0):
            stretched = self.base_product(dropped, *rest)
        else:
            bias = self._bias()
            stretched = plain if bias is None else plain - bias
        gain = self.along_output(self._gain(name), *rest)
        return (gain - 1) * stretched + gain * added

    def _gain(self, name: str) -> Tensor:
        """Return m / ‖W + s·B·A‖ of each output; the norm gets no gradient."""
        a, b = self.lora_A[name], self.lora_B[name]
        with torch.no_grad():
            work = torch.promote_types(a.dtype, torch.float32)
            product = self._scales[name] * self.product(a.to(work), b.to(work))
            norms = self.output_norms(self.base_weight.to(work) + product)
        return self.lora_magnitude[name] / norms

    def _bias(self) -> Tensor | None:
        """The frozen layer's bias, shaped like its output."""
        bias = getattr(self.base, "bias", None)
        return None if bias is None else self.along_output(bias)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with: the frozen one and what the active adapters make of it."""
        weight: Tensor = self.base_weight
        if self.merged:
            return weight
        if not self.enabled:
            for a, b, scale in self._missing():
                weight = weight + (scale * self.product(a, b)).to(weight.dtype)
            return weight
        for a, b, scale, name in self._in_use():
            weight = weight + (scale * self.product(a, b)).to(weight.dtype)
            if self.settings[name].dora:
                weight = weight * self._along_weight(self._gain(name)).to(weight.dtype)
        return weight

    def extra_repr(self) -> str:
        """The adapters in use, with rank and strength; others by name."""
        scales = {name: f"scale {scale:g}" for name, scale in self._scales.items()}
        adapters = [f"{name}: rank {p.rank}, {scales.get(name, 'not in use')}" for name, p in self.settings.items()]
        return ", ".join([*adapters, *(["merged"] if self.merged else [])])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # How the frozen layer is copied is not how this one is, and a property that fails is not one of its.
            if name == "base" or name.startswith("__") or hasattr(type(self), name):
                raise
            return getattr(self.base, name)
