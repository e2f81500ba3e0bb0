"""How the factors of a new adapter begin: A by one of three rules, B zero, the same bytes on every machine.

    kaiming      uniform on (-1/√in, 1/√in): He et al. 2015 with a = √5, what torch.nn.Linear and PEFT begin with; a
                 lookup takes one entry of an embedding, so there it is (-1/√rank, 1/√rank), for the layer behind A
    gaussian     normal with mean 0 and a given standard deviation (Hu et al. 2021)
    orthogonal   orthonormal rows (columns where the rank is larger than the input): Saxe et al. 2014

Random bits are the raw stream of Philox4x64-10 (Salmon et al. 2011), a counter under a key; NumPy promises that this
stream never changes. The key is the SHA-256 of the seed and the tensor's name, so no factor depends on which others
were made before it; the name is `MODULE.lora_A.weight` for every kind of module and every layout. Everything after
that is +, -, ×, / and square root in float64, which IEEE 754 fixes to the last bit. The logarithm and the sums are
written out below, because those of libraries differ between machines.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_cli.checkpoint.dtypes import DTYPES, DType
from lora_cli.errors import UnsupportedError, UsageError

Floats = NDArray[np.float64]

INITS = ("kaiming", "gaussian", "orthogonal")
"""Rules for A."""

ZEROS = "zeros"
"""The rule for B."""

GAUSSIAN_STD = 0.01
"""Standard deviation of `gaussian` unless the user gives one."""

BLOCK_ELEMENTS = 1 << 16
"""Elements that are made at once: a multiple of the four numbers that Philox gives for one counter."""

_FLOATS_AT_ONCE = 12  # arrays of one block that the normals take at their height
_LOG_TERMS = 12


@dataclass(frozen=True, slots=True)
class FreshTensor:
    """A factor that is made from a rule, and stored nowhere yet.

    Attributes:
        key: Its name, which with the seed decides its numbers.
        dtype: Storage type: F32, BF16 or F16.
        shape: (rank, in) for A, (out, rank) for B; those of a convolution go on with its kernel, or with ones.
        rule: One of `INITS`, or `ZEROS`.
        seed: The user's seed.
        std: Standard deviation of `gaussian`.
        table: It is A of an embedding.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    rule: str
    seed: int = 0
    std: float = GAUSSIAN_STD
    table: bool = False

    def __str__(self) -> str:
        """Describe the rule for a person."""
        if self.rule == ZEROS:
            return self.rule
        width = f", std {self.std:g}" if self.rule == "gaussian" else ""
        return f"{self.rule}, seed {self.seed}{width}"

    @property
    def working_bytes(self) -> int:
        """Bytes of memory that making it takes."""
        elements = math.prod(self.shape)
        if self.rule == "orthogonal":
            return 8 * elements * 4
        return 8 * min(elements, BLOCK_ELEMENTS) * _FLOATS_AT_ONCE

    def blocks(self, begin: int, end: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield elements `begin` to `end` as stored, in order, each block with the index of its first element."""
        make = self._maker()
        for start in range(begin, end, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, end)
            yield start, stored(make(start, stop), self.dtype)

    def _maker(self) -> Callable[[int, int], Floats]:
        if self.rule == ZEROS:
            return lambda begin, end: np.zeros(end - begin)
        if self.rule == "orthogonal":
            whole = orthogonal(self.key, self.shape[0], self._inner, seed=self.seed).reshape(-1)
            return lambda begin, end: whole[begin:end]
        if self.rule == "gaussian":
            return lambda begin, end: normals(self.key, begin, end, seed=self.seed) * self.std
        check_rule(self.rule)
        bound = 1.0 / math.sqrt(self.shape[0] if self.table else self._inner)
        return lambda begin, end: uniforms(self.key, begin, end, seed=self.seed) * bound

    @property
    def _inner(self) -> int:
        """Numbers that each row of A is multiplied with."""
        return math.prod(self.shape[1:])


def draw(
    rule: str,
    key: str,
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    std: float = GAUSSIAN_STD,
    table: bool = False,
) -> Floats:
    """Return a whole factor in float64, before it is rounded to a storage type.

    Args:
        rule: One of `INITS`.
        key: Name of the factor, such as `model.layers.0.self_attn.q_proj.lora_A.weight`.
        shape: (rank, in), or (rank, in / groups, kernel…) of a convolution.
        seed: Any whole number.
        std: Standard deviation of `gaussian`.
        table: It is A of an embedding.

    Raises:
        UsageError: No such rule.
    """
    fresh = FreshTensor(key, DTYPES["F64"], shape, rule, seed, std, table)
    return fresh._maker()(0, math.prod(shape)).reshape(shape)


def check_rule(rule: str) -> None:
    """Refuse a rule that does not exist.

    Raises:
        UsageError: With those that do.
    """
    if rule not in INITS:
        raise UsageError("No such init", expected=", ".join(INITS), found=rule)


def uniforms(key: str, begin: int, end: int, *, seed: int = 0) -> Floats:
    """Numbers `begin` to `end` of the key's stream, uniform on (-1, 1): odd multiples of 2⁻⁵³, so never 0 or ±1."""
    return _symmetric(_raw(seed, key, begin, end))


def normals(key: str, begin: int, end: int, *, seed: int = 0) -> Floats:
    """Numbers `begin` to `end` of the key's stream, normal with mean 0 and standard deviation 1."""
    # (2k + 1)·2⁻⁵³ with k of 52 bits: exact, in (0, 1), and 1 - p is exact as well.
    below = (_raw(seed, key, begin, end) >> np.uint64(12)).astype(np.float64)
    return normal_quantile((2.0 * below + 1.0) * 2.0**-53)


def orthogonal(key: str, rows: int, columns: int, *, seed: int = 0) -> Floats:
    """A matrix with orthonormal rows, or columns where it has more rows than columns, drawn evenly from all of them.

    Gram and Schmidt's method on rows of normal numbers. Each row is freed twice of what lies along the earlier ones:
    the second pass takes off what rounding left, and no third one is needed (Giraud, Langou and Rozložník 2005).
    """
    few, many = min(rows, columns), max(rows, columns)
    basis = normals(key, 0, few * many, seed=seed).reshape(few, many)
    for index in range(few):
        row, earlier = basis[index], basis[:index]
        for _ in range(2 if index else 1):
            if index:
                shares = fold(earlier * row, axis=1)
                row -= fold(earlier * shares[:, None], axis=0)
            row /= math.sqrt(float(fold(row * row, axis=0)))
    return basis if rows <= columns else np.ascontiguousarray(basis.T)


def fold(values: Floats, axis: int) -> Floats:
    """Sum along an axis, by adding the upper half to the lower one until one is left: one order on every machine.

    Uses up `values`.
    """
    lanes = np.moveaxis(values, axis, 0)
    count = len(lanes)
    while count > 1:
        half = (count + 1) // 2
        lanes[: count - half] += lanes[half:count]
        count = half
    total: Floats = lanes[0]
    return total


def normal_quantile(p: Floats) -> Floats:
    """The inverse of the standard normal distribution function, to about 1 part in 10¹⁵: AS 241 (Wichura 1988).

    Args:
        p: Probabilities strictly between 0 and 1.
    """
    q = p - 0.5
    centre = 0.180625 - q * q
    result = q * (_polynomial(_CENTRE[0], centre) / _polynomial(_CENTRE[1], centre))
    tails = np.flatnonzero(np.abs(q) > 0.425)
    if tails.size:
        r = np.sqrt(-logarithm(np.minimum(p[tails], 1.0 - p[tails])))
        near = _polynomial(_NEAR[0], r - 1.6) / _polynomial(_NEAR[1], r - 1.6)
        far = _polynomial(_FAR[0], r - 5.0) / _polynomial(_FAR[1], r - 5.0)
        result[tails] = np.copysign(np.where(r <= 5.0, near, far), q[tails])
    return result


def logarithm(x: Floats) -> Floats:
    """The natural logarithm of positive numbers, to a few units in the last place.

    With x = m·2ᵉ and m in [√½, √2): log x = e·log 2 + 2·artanh((m-1)/(m+1)), and artanh by its Taylor series, whose
    argument is at most 0.172. log 2 is split in two, so that e times its upper part is exact.
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, 2.0 * mantissa, mantissa)
    e = exponent.astype(np.float64) - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial(_ARTANH, s * s)
    return e * _LOG2_HIGH + (2.0 * s * series + e * _LOG2_LOW)


def stored(values: Floats, dtype: DType) -> NDArray[np.uint8]:
    """Round to a storage type, once and to nearest even, and return the bytes.

    Raises:
        UnsupportedError: No factor is stored like that.
    """
    if dtype.name == "BF16":
        return (_to_eight_bits(values).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    if dtype.name not in ("F16", "F32"):
        raise UnsupportedError("Factors are not made in this storage type", expected="F32, BF16 or F16", found=dtype)
    return values.astype("<f2" if dtype.name == "F16" else "<f4").view(np.uint8)


def _to_eight_bits(values: Floats) -> NDArray[np.float32]:
    """Round float64 to bfloat16's 8 significant bits, directly: over float32 it could be rounded twice."""
    drop = np.uint64(53 - 8)
    bits = values.view(np.uint64)
    half = np.uint64((1 << 44) - 1) + ((bits >> drop) & np.uint64(1))
    return (((bits + half) >> drop) << drop).view(np.float64).astype(np.float32)


def _raw(seed: int, key: str, begin: int, end: int) -> NDArray[np.uint64]:
    """Numbers `begin` to `end` of the stream; one counter gives four, and NumPy's first counter is 1."""
    digest = hashlib.sha256(f"lora-cli/init/1\0{seed}\0{key}".encode()).digest()
    words = np.frombuffer(digest[:16], "<u8").astype(np.uint64)
    generator = np.random.Philox(key=words)
    generator.advance(begin // 4)
    numbers: NDArray[np.uint64] = generator.random_raw(end - begin // 4 * 4)
    return numbers[begin % 4 :]


def _symmetric(raw: NDArray[np.uint64]) -> Floats:
    # k of 53 bits: 2k + 1 - 2⁵³ is odd, under 2⁵³ and so exact; the subtraction is done first.
    upper = (raw >> np.uint64(11)).astype(np.int64)
    return (2 * upper + 1 - (1 << 53)).astype(np.float64) * 2.0**-53


def _polynomial(coefficients: Sequence[float], x: Floats) -> Floats:
    """Horner's scheme, highest power first."""
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result *= x
        result += coefficient
    return result


_ARTANH = tuple(1.0 / (2 * k + 1) for k in reversed(range(_LOG_TERMS)))
_LOG2_HIGH = float.fromhex("0x1.62e42feep-1")  # 32 bits: exact times any exponent
_LOG2_LOW = float.fromhex("0x1.a39ef35793c76p-33")

# Numerators and denominators of AS 241's PPND16, highest power first.
_CENTRE = (
    (
        *(2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4),
        *(1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    ),
    (
        *(5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4),
        *(5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
    ),
)
_NEAR = (
    (
        *(7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0),
        *(3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    ),
    (
        *(1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1),
        *(6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
    ),
)
_FAR = (
    (
        *(2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2),
        *(2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    ),
    (
        *(2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4),
        *(1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
    ),
)
