"""What kinds of layers differ in: which they are for, the shapes of factors, and what a weight does to an input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.adapters.modules import Kind, describe
from lora_cli.adapters.targets import Selected, factor_shapes
from lora_cli.errors import UnsupportedError
from lora_cli.nn.merging import Merging
from lora_cli.nn.parameters import LoRAParameters
from lora_cli.nn.starts import Start


class KindOfLayer(Merging):
    """What a LoRA layer of one kind says of itself. What stands here is right for layers that multiply by a matrix."""

    kind: ClassVar[Kind]
    layers: ClassVar[tuple[type[nn.Module], ...]] = ()

    @classmethod
    def takes(cls, layer: nn.Module) -> bool:
        """Whether this class is for layers of this type."""
        return isinstance(layer, cls.layers)

    def _check_base(self) -> None:
        """Refuse a layer that adapters cannot be put beside.

        Raises:
            UnsupportedError: Says why.
        """
        if not self.takes(self.base):
            self._refuse_base(f"{type(self).__name__} is for layers of another type")
        weight = self.base._parameters.get(self.weight_name)
        if weight is None:
            self._refuse_base("its weight is no parameter of its own")
        elif nn.parameter.is_lazy(weight):
            self._refuse_base("its weight has no shape before the first input")
        elif not weight.dtype.is_floating_point:
            self._refuse_base(f"its weight is quantised: {weight.dtype} takes no delta")

    def _refuse_base(self, why: str) -> None:
        raise UnsupportedError(
            "Adapters cannot be put beside this layer", found=type(self.base).__name__, details=[why]
        )

    def _check_parameters(self, parameters: LoRAParameters) -> None:
        """Refuse what this kind of layer does not take.

        Raises:
            UnsupportedError: Says why.
        """

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        """Return B·A·x in the factors' type, without the scale."""
        raise NotImplementedError

    def base_product(self, x: Tensor, *rest: Any) -> Tensor:
        """Return W·x: what the frozen layer gives without its bias."""
        raise NotImplementedError

    def along_output(self, values: Tensor, *rest: Any) -> Tensor:
        """Shape one number for each output so that it multiplies what the layer gives."""
        return values

    def released(self) -> nn.Module:
        """The frozen layer, as it stood in the model before."""
        return self.base

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        return factor_shapes(self.selected(), rank)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return B·A in the shape of the weight."""
        whole: Tensor = b.flatten(1) @ a.flatten(1)
        return (whole.T if self.transposed else whole).reshape(self.base_weight.shape)

    def output_norms(self, weight: Tensor) -> Tensor:
        """Return the length of each output's row of a weight."""
        matrix = weight.flatten(1)
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=0 if self.transposed else 1)
        return norms

    def _along_weight(self, gain: Tensor) -> Tensor:
        """Shape one number for each output so that it multiplies the stored weight."""
        return gain if self.transposed else gain.view(-1, *(1 for _ in self.base_weight.shape[1:]))

    def first_factor(self, start: Start, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Draw A."""
        return start.first_factor(shape, dtype)

    @property
    def output_size(self) -> int:
        """How many numbers the layer gives for one input: features, or channels."""
        return self.selected().out

    def selected(self, module: str = "") -> Selected:
        """What target choice knows of the frozen layer, under a name in its model."""
        key = f"{module}.{self.weight_name}"
        described = describe(module, key, self.base_weight.shape, None, kind=self.kind)
        return Selected.of(described, self.transposed and self.kind == "linear")

    def matrix(self) -> Tensor:
        """The frozen weight as one matrix, (out × in), in float64."""
        matrix = self.base_weight.detach().to(torch.float64).flatten(1)
        return matrix.T if self.transposed else matrix
