"""LoRA beside a convolution."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional

from lora_cli.adapters.modules import Kind
from lora_cli.nn.layer import LoRALayer

_POINTWISE = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


class LoRAConv(LoRALayer):
    """LoRA beside `torch.nn.Conv1d`, `Conv2d` or `Conv3d`: ΔW = s·B·A on the kernel, flattened to (out × rest).

    W is (out, in / groups, kernel…), A (rank, in / groups, kernel…), B (out, rank, 1…). What the adapter adds is a
    convolution with A, which has the stride, the padding and its mode, and the dilation of the layer (PEFT 0.21 leaves
    out the last two), and a pointwise one with B. With groups an output channel sees its own inputs only, so the layer
    convolves with B·A itself; PEFT has another definition there. Dropout is on the input, as in PEFT; where
    implementations have it between A and B, other numbers are left out.
    """

    kind: ClassVar[Kind] = "conv"
    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def _check_base(self) -> None:
        super()._check_base()
        known = next(cls for cls in self.layers if isinstance(self.base, cls))
        own = [
            name for name in ("forward", "_conv_forward") if getattr(type(self.base), name) is not getattr(known, name)
        ]
        if own:
            self._refuse_base("it convolves in a way of its own, which a change of its kernel may not follow")

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return B·A·x in the factors' type, without the scale."""
        x = x.to(a.dtype)
        if cast("int", self.base.groups) > 1:
            return self._convolved(x, self.product(a, b))
        return _POINTWISE[b.dim()](self._convolved(x, a), b)

    def base_product(self, x: Tensor) -> Tensor:
        """Return W·x."""
        return self._convolved(x.to(self.base_weight.dtype), self.base_weight)

    def along_output(self, values: Tensor, *rest: Any) -> Tensor:
        """Shape one number for each channel so that it multiplies what the layer gives."""
        return values.view(-1, *(1 for _ in self.base_weight.shape[2:]))

    def _convolved(self, x: Tensor, kernel: Tensor) -> Tensor:
        # Only this function of torch knows what all modes of padding mean.
        return cast("Tensor", cast("nn.Conv2d", self.base)._conv_forward(x, kernel, None))
