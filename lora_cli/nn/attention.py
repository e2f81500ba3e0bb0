"""LoRA beside torch's multi-head attention, which multiplies by its weights itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.func import functional_call

from lora_cli.adapters.modules import Kind
from lora_cli.errors import UnsupportedError
from lora_cli.nn.factors import DEFAULT
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.linear import LoRALinear
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.starts import Start


class LoRAMultiheadAttention(LoRALayer):
    """LoRA beside `torch.nn.MultiheadAttention`: an adapter on the input projections, one on the output projection.

    The input projections are one weight (3·E × E): A is (rank × E), B (3·E × rank). A LoRA layer takes the place of
    `base.out_proj` and does what this one does: keys are `base.in_proj_weight`, `lora_A.weight`, …,
    `base.out_proj.base.weight`, `base.out_proj.lora_A.weight`, ….

    Attention is computed by torch with the weights that adapters make, also on its fast path in
    `torch.nn.TransformerEncoderLayer`. There is no branch beside the weights, and so no dropout.
    """

    kind: ClassVar[Kind] = "attention"
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.MultiheadAttention,)
    weight_name: ClassVar[str] = "in_proj_weight"

    def __init__(
        self,
        base: nn.Module,
        parameters: LoRAParameters | None = None,
        *,
        name: str = DEFAULT,
        start: Start | None = None,
    ) -> None:
        super().__init__(base)
        base.out_proj = LoRALinear(cast("nn.Module", base.out_proj))
        if parameters is not None:
            self.add_adapter(name, parameters, start=start)

    def _check_base(self) -> None:
        if self.takes(self.base) and not self.base._qkv_same_embed_dim:
            self._refuse_base("kdim or vdim differ from embed_dim, so queries, keys and values have weights apart")
        super()._check_base()

    def _check_parameters(self, parameters: LoRAParameters) -> None:
        if parameters.dropout > 0:
            raise UnsupportedError(
                "Attention takes no dropout on adapters", tensor="dropout", expected=0, found=parameters.dropout
            )

    @property
    def out_proj(self) -> LoRALinear:
        """The output projection with its adapters."""
        return cast("LoRALinear", self.base.out_proj)

    @property
    def in_proj_weight(self) -> Tensor:
        """The weight of the input projections that attention computes with: `weight`, as torch's fast path has it."""
        return self.weight

    @property
    def output_size(self) -> int:
        """How many numbers attention gives for one input."""
        return cast("int", self.base.embed_dim)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B of the input projections."""
        out, inner = self.base_weight.shape
        return (rank, inner), (out, rank)

    def released(self) -> nn.Module:
        """The frozen attention with its own output projection again."""
        self.base.out_proj = self.out_proj.released()
        return self.base

    # Both projections together

    def add_adapter(self, name: str, parameters: LoRAParameters, *, start: Start | None = None) -> None:
        """Put an adapter beside both projections; that of the output begins as the module `out_proj` in this one."""
        super().add_adapter(name, parameters, start=start)
        try:
            self.out_proj.add_adapter(name, parameters, start=_inner(start))
        except BaseException:
            super().remove_adapter(name)
            if name in self._taken:
                self._give_back(name)
            raise

    def reset_parameters(self, name: str = DEFAULT, start: Start | None = None) -> None:
        """Begin an adapter of both projections anew."""
        super().reset_parameters(name, start)
        self.out_proj.reset_parameters(name, _inner(start))

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away from both projections."""
        super().remove_adapter(name)
        self.out_proj.remove_adapter(name)

    def check_removable(self, name: str) -> None:
        """Refuse what `remove_adapter` refuses, of both projections."""
        super().check_removable(name)
        if name in self.out_proj.settings:  # not yet, where adding it failed half-way
            self.out_proj.check_removable(name)

    def check_unmergeable(self) -> None:
        """Refuse merged weights that were changed since, of both projections."""
        super().check_unmergeable()
        self.out_proj.check_unmergeable()

    def check_restorable(self) -> None:
        """Refuse weights that were changed since an init took something off them, of both projections."""
        super().check_restorable()
        self.out_proj.check_restorable()

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Refuse what `activate` refuses, of both projections."""
        super().check_weights(weights)
        self.out_proj.check_weights(weights)

    def activate(self, weights: Mapping[str, float]) -> None:
        """Use exactly these adapters, each with its weight, on both projections."""
        super().activate(weights)
        self.out_proj.activate(weights)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute with the frozen layer alone for a while."""
        with super().disabled(), self.out_proj.disabled():
            yield

    def merge(self) -> None:
        """Put the active adapters into both weights, or into none."""
        super().merge()
        try:
            self.out_proj.merge()
        except BaseException:
            super().unmerge()
            raise

    def unmerge(self) -> None:
        """Give both weights back bit for bit, or none."""
        merged = self.base_weight.detach().clone()
        forgotten = self._forgotten
        super().unmerge()
        try:
            self.out_proj.unmerge()
        except BaseException:
            self.base_weight.data.copy_(merged)
            self._forgotten = forgotten
            raise

    def restore_base(self) -> None:
        """Give both weights back what inits took off them."""
        super().restore_base()
        self.out_proj.restore_base()

    # Computing

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Attend. Arguments and results are those of `torch.nn.MultiheadAttention`."""
        result: tuple[Tensor, Tensor | None] = functional_call(self.base, {self.weight_name: self.weight}, args, kwargs)
        return result

    def delta(self, x: Tensor, *rest: Any) -> Tensor:
        """Refuse: attention is not linear in its weights, so there is no such sum.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("What an adapter of attention adds is not a delta of its output", found="delta")


def _inner(start: Start | None) -> Start | None:
    return start and replace(start, module=f"{start.module}.out_proj" if start.module else "out_proj")
