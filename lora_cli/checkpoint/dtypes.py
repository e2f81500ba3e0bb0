"""The storage types of the safetensors format, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lora_cli.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class DType:
    """How the elements of a tensor are stored.

    Attributes:
        name: What a header calls it, such as `BF16`.
        bits: Width of one element. Under 8, elements are packed without gaps, and only the tensor as a whole
            must fill its bytes: `F4` of shape (3, 2) is 3 bytes, of shape (3,) it is not valid.
        torch_name: The attribute of `torch`, such as `bfloat16`; None where torch has no type that keeps the
            shape.
    """

    name: str
    bits: int
    torch_name: str | None

    @property
    def floating(self) -> bool:
        """Whether elements are real floating-point numbers of 8 bits or more."""
        return self.bits >= 8 and self.name.startswith(("F", "BF"))


# In the order of the format's own list. torch packs two 4-bit numbers into one element, which halves the last
# dimension of the shape, and it has no 6-bit type: neither can be named here.
DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        name: DType(name, bits, torch_name)
        for name, bits, torch_name in (
            ("BOOL", 8, "bool"),
            ("F4", 4, None),
            ("F6_E2M3", 6, None),
            ("F6_E3M2", 6, None),
            ("U8", 8, "uint8"),
            ("I8", 8, "int8"),
            ("F8_E5M2", 8, "float8_e5m2"),
            ("F8_E4M3", 8, "float8_e4m3fn"),
            ("F8_E8M0", 8, "float8_e8m0fnu"),
            ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
            ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
            ("I16", 16, "int16"),
            ("U16", 16, "uint16"),
            ("F16", 16, "float16"),
            ("BF16", 16, "bfloat16"),
            ("I32", 32, "int32"),
            ("U32", 32, "uint32"),
            ("F32", 32, "float32"),
            ("C64", 64, "complex64"),
            ("F64", 64, "float64"),
            ("I64", 64, "int64"),
            ("U64", 64, "uint64"),
        )
    }
)
"""Every type that safetensors 0.8.0 reads, by its name in a header."""

_BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DTYPES.values() if dtype.torch_name}


def dtype_for_torch(name: str) -> DType:
    """Return the storage type of a torch dtype, given as `bfloat16` or `torch.bfloat16`.

    Raises:
        UnsupportedError: The format has no type for it.
    """
    dtype = _BY_TORCH_NAME.get(name.removeprefix("torch."))
    if dtype is None:
        raise UnsupportedError("The safetensors format has no storage type for this torch dtype", found=name)
    return dtype
