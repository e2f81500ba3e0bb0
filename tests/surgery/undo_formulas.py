"""The formulas of docs/undo-file.md, from the page alone: Python's floats, whose single operations IEEE 754 defines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import reference
from reference import Term
from undo_draws import places, shared
from undo_transforms import fourier, wavelet

Floats = list[list[float]]
Said = Mapping[str, Any]


@dataclass
class Tensor:
    """A tensor's shape and numbers."""

    shape: Sequence[int]
    numbers: Sequence[Fraction]

    @property
    def floats(self) -> list[float]:
        """Its numbers in float64."""
        return [float(number) for number in self.numbers]

    @property
    def rows(self) -> Floats:
        """Its rows as a matrix."""
        found, width = self.floats, math.prod(self.shape[1:])
        return [found[at * width : (at + 1) * width] for at in range(self.shape[0])]

    @property
    def blocks(self) -> list[Floats]:
        """Its matrices, of three dimensions."""
        _, high, wide = self.shape
        return [[row[at * wide : (at + 1) * wide] for at in range(high)] for row in self.rows]


Tensors = Mapping[str, Tensor]


def turned(matrix: Floats) -> Floats:
    return [list(row) for row in zip(*matrix, strict=True)]


def term(b: Floats, a: Floats, scale: float) -> Term:
    left, right = ([[Fraction(value) for value in row] for row in matrix] for matrix in (b, a))
    return Term(left, right, scale)


def exact(b: Floats, a: Floats, scale: float = 1.0) -> Floats:
    """The exact product on two grids."""
    return [[float(value) for value in row] for row in reference.product([term(b, a, scale)], 2)]


def size(said: Said) -> tuple[int, int]:
    """Outputs and inputs."""
    return said["shape"][0], math.prod(said["shape"][1:])


def elementwise(said: Said, value: Callable[[int, int], float]) -> Floats:
    out, inner = size(said)
    return [[value(i, j) for j in range(inner)] for i in range(out)]


def norm(values: Sequence[float]) -> float:
    """The length of a row: runs of 64, groups of 64 runs."""
    groups = [values[at : at + 4096] for at in range(0, len(values), 4096)]
    total = 0.0
    for group in groups:
        of_group = 0.0
        for at in range(0, len(group), 64):
            lanes = [value * value for value in group[at : at + 64]]
            lanes += [0.0] * (64 - len(lanes))
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [lanes[n] + lanes[half + n] for n in range(half)]
            of_group += lanes[0]
        total += of_group
    return max(math.sqrt(total), 1e-4)


# Products


def adalora(t: Tensors, said: Said) -> Term:
    weights = t["lora_E"].floats
    a = [[value * weight for value in row] for row, weight in zip(t["lora_A"].rows, weights, strict=True)]
    return term(t["lora_B"].rows, a, said["scale"])


def beft(t: Tensors, said: Said) -> Term:
    return term([[value] for value in t["beft_bias"].floats], [[1.0]], said["scale"])


def delora(t: Tensors, said: Said) -> Term:
    a, b, (far,), norms = t["delora_A"].rows, t["delora_B"].rows, t["delora_lambda"].floats, t["delora_w_norm"].floats
    shares = [far / len(a) / (norm(row) * norm(column)) for row, column in zip(a, turned(b), strict=True)]
    left = [[value * share for value, share in zip(row, shares, strict=True)] for row in b]
    right = [[value * length for value, length in zip(row, norms, strict=True)] for row in a]
    return term(left, right, said["scale"])


def gralora(t: Tensors, said: Said) -> Term:
    a, b, (out, inner) = t["gralora_A"].blocks, t["gralora_B"].blocks, size(said)
    count, piece = len(a), len(a[0][0]) // len(a)
    width, height = inner // count, out // count
    left: Floats = [[] for _ in range(out)]
    right: Floats = []
    for n in range(count):
        for j in range(count):
            for q in range(piece):
                column, row = [0.0] * out, [0.0] * inner
                column[j * height : (j + 1) * height] = b[j][n * piece + q]
                row[n * width : (n + 1) * width] = [values[j * piece + q] for values in a[n]]
                right.append(row)
                for values, value in zip(left, column, strict=True):
                    values.append(value)
    if "gralora_A_general" in t:
        left = [one + other for one, other in zip(left, t["gralora_B_general"].rows, strict=True)]
        right += t["gralora_A_general"].rows
    return term(left, right, said["scale"])


def randlora(t: Tensors, said: Said) -> Term:
    between, along, (out, inner) = t["randlora_lambda"].rows, t["randlora_gamma"].rows, size(said)
    least, most, count = min(out, inner), max(out, inner), len(along)
    a, b = t["randlora_A"].blocks, t["randlora_B"].blocks
    small = [
        [between[r][n] * a[r][n if len(a[r]) > 1 else 0][i] * along[n][i] for i in range(least)]
        for r in range(len(between))
        for n in range(count)
    ]
    large = [[value for n in range(count) for value in b[i][n]] for i in range(most)]
    left, right = (large, small) if least == inner else (turned(small), turned(large))
    return term(left, right, said["scale"])


def tinylora(t: Tensors, said: Said) -> Term:
    b, rank = t["tinylora_B"].rows, len(t["tinylora_A"].rows)
    middle = [[0.0] * rank for _ in range(rank)]
    for share, matrix in zip(t["tinylora_v"].floats, t["tinylora_P"].blocks, strict=True):
        middle = [[m + p * share for m, p in zip(*rows, strict=True)] for rows in zip(middle, matrix, strict=True)]
    left = [[0.0] * rank for _ in b]
    for r, row in enumerate(middle):
        left = [[v + values[r] * m for v, m in zip(old, row, strict=True)] for old, values in zip(left, b, strict=True)]
    return term(left, t["tinylora_A"].rows, said["scale"])


def unilora(t: Tensors, said: Said) -> Term:
    vector = t["unilora_theta_d"].floats
    a, b = (
        [
            [vector[int(at)] * scale for at, scale in zip(*rows, strict=True)]
            for rows in zip(t[f"unilora_indices_{side}"].rows, t[f"unilora_scales_{side}"].rows, strict=True)
        ]
        for side in "AB"
    )
    return term(b, a, said["scale"])


def vera(t: Tensors, said: Said) -> Term:
    name = said["kind"].removesuffix("-drawn")
    out, inner = size(said)
    of_b, of_a = t[f"{name}_lambda_b"].floats, t[f"{name}_lambda_d"].floats
    rank = len(of_a) // (2 if name == "pvera" else 1)
    if said["kind"].endswith("-drawn"):
        settings = said["settings"]
        a, b = shared(settings["seed"], (len(of_a), settings["inputs"]), (settings["outputs"], rank))
    else:
        a, b = t[f"{name}_A"].rows, t[f"{name}_B"].rows
    left = [[value * of_b[i] for value in b[i]] for i in range(out)]
    return term(left, [[value * of_a[r] for value in a[r][:inner]] for r in range(rank)], said["scale"])


def vblora(t: Tensors, said: Said) -> Term:
    bank = t["vblora_vector_bank"].rows
    (a, rank, wide), (b, high, _) = (_mixtures(t, said, side, bank) for side in "AB")
    right = [[value for n in range(wide) for value in a[r * wide + n]] for r in range(rank)]
    left = [[b[n * rank + r][at] for r in range(rank)] for n in range(high) for at in range(len(bank[0]))]
    return term(left, right, said["scale"])


def _mixtures(t: Tensors, said: Said, side: str, bank: Floats) -> tuple[Floats, int, int]:
    """The pieces of one side, and how many there are each way."""
    name = f"vblora_logits_{side}"
    if name in t:
        shape, pairs = t[name].shape, [_chosen(row, said["settings"]["topk"]) for row in _last(t[name])]
    else:
        shape = t[f"{name}_topk_indices"].shape
        weights = t[f"{name}_topk_weights"].floats
        count, pairs = shape[2], []
        for at, row in enumerate(_last(t[f"{name}_topk_indices"])):
            first = weights[at * (count - 1) : (at + 1) * (count - 1)]
            rest = 1.0
            for weight in first:
                rest -= weight
            pairs.append(([*first, rest], [int(index) for index in row]))
    made = []
    for weights, indices in pairs:
        total = [weights[0] * value for value in bank[indices[0]]]
        for weight, index in zip(weights[1:], indices[1:], strict=True):
            total = [value + weight * more for value, more in zip(total, bank[index], strict=True)]
        made.append(total)
    return made, shape[0], shape[1]


def _last(tensor: Tensor) -> Floats:
    width, found = tensor.shape[-1], tensor.floats
    return [found[at : at + width] for at in range(0, len(found), width)]


def _chosen(logits: Sequence[float], count: int) -> tuple[list[float], list[int]]:
    order = sorted(range(len(logits)), key=lambda at: -logits[at])[:count]
    powers = [exponential(logits[at] - logits[order[0]]) for at in order]
    total = powers[0]
    for power in powers[1:]:
        total += power
    return [power / total for power in powers], order


def exponential(x: float) -> float:
    """e to the power of a number that is not above zero."""
    if x < -700:
        return 0.0
    k = float(round(x * (1.0 / math.log(2.0))))
    rest = x - k * float.fromhex("0x1.62e42fee00000p-1")
    rest = rest - k * float.fromhex("0x1.a39ef35793c76p-33")
    total = 1.0 / math.factorial(13)
    for power in reversed(range(13)):
        total = total * rest + 1.0 / math.factorial(power)
    return math.ldexp(total, int(k))


# Sums


def c3a(t: Tensors, said: Said) -> Floats:
    kernel, (_, inner) = t["c3a_kernel"].blocks, size(said)
    block, scale = len(kernel[0][0]), said["scale"] / inner
    return elementwise(said, lambda i, j: kernel[i // block][j // block][(j - i) % block] * scale)


def loha(t: Tensors, said: Said) -> Floats:
    first, second = (_loha_side(t, side) for side in "12")
    return elementwise(said, lambda i, j: first[i][j] * second[i][j] * said["scale"])


def _loha_side(t: Tensors, side: str) -> Floats:
    a, b, core = t[f"hada_w{side}_a"].rows, t[f"hada_w{side}_b"].rows, t.get(f"hada_t{side}")
    return exact(a, b) if core is None else exact(turned(a), tucker(core, b))


def tucker(core: Tensor, b: Floats) -> Floats:
    """(rank × in·k…): an exact product for each place of the kernel."""
    rank, spots = core.shape[0], math.prod(core.shape[2:])
    rows = core.rows
    made = [exact([[rows[i][j * spots + k] for j in range(rank)] for i in range(rank)], b) for k in range(spots)]
    return [[made[k][i][at] for at in range(len(b[0])) for k in range(spots)] for i in range(rank)]


def lokr(t: Tensors, said: Said) -> Floats:
    first, second = _lokr_side(t, "lokr_w1"), _lokr_side(t, "lokr_w2")
    if "lokr_w2" in t and len(t["lokr_w2"].shape) == 3:
        taps, scale = int(said["shape"][2]), float(said["scale"])
        high, wide = len(first), len(first[0])

        def dealt(i: int, j: int) -> float:
            right = second[i // high][j // taps // wide * taps + j % taps]
            return first[i % high][j // taps % wide] * right * scale

        return elementwise(said, dealt)
    k, n = len(second), len(second[0])
    return elementwise(said, lambda i, j: first[i // k][j // n] * second[i % k][j % n] * said["scale"])


def _lokr_side(t: Tensors, name: str) -> Floats:
    if name in t:
        return t[name].rows
    a, b = t[f"{name}_a"].rows, t[f"{name}_b"].rows
    return exact(turned(a), tucker(t["lokr_t2"], b)) if name == "lokr_w2" and "lokr_t2" in t else exact(a, b)


def miss(t: Tensors, said: Said) -> Floats:
    block = t["miss_block"].rows
    return elementwise(said, lambda i, j: block[j % len(block)][i % len(block[0])] * said["scale"])


def scattered(said: Said, at: Sequence[int], values: Sequence[float]) -> Floats:
    there = dict(zip(at, values, strict=True))
    inner = size(said)[1]
    return elementwise(said, lambda i, j: there.get(i * inner + j, 0.0))


def shira(t: Tensors, said: Said) -> Floats:
    rows, columns = t["shira_indices"].rows
    at = [int(row) * size(said)[1] + int(column) for row, column in zip(rows, columns, strict=True)]
    return scattered(said, at, [value * said["scale"] for value in t["shira_weight"].floats])


def supertuning(t: Tensors, said: Said) -> Floats:
    at = [int(place) for place in t["supertuning_indices"].floats]
    sparse = scattered(said, at, [value * said["scale"] for value in t["supertuning_values"].floats])
    if "supertuning_lora_A" not in t:
        return sparse
    a, b = t["supertuning_lora_A"].rows, t["supertuning_lora_B"].rows
    product = exact(b, a, said["scale"] * said["settings"]["alpha"] / len(a))
    return elementwise(said, lambda i, j: product[i][j] + sparse[i][j])


def fourierft(t: Tensors, said: Said) -> Floats:
    (out, inner), numbers = size(said), t["fourierft_spectrum"].floats
    at = places(said["settings"]["seed"], out * inner, len(numbers))
    return fourier(out, inner, at, [value * said["scale"] / (out * inner) / 2 for value in numbers])


def waveft(t: Tensors, said: Said) -> Floats:
    (out, inner), numbers = size(said), t["waveft_spectrum"].floats
    at = places(said["settings"]["seed"], out * inner, len(numbers))
    values, name = [value * said["scale"] for value in numbers], said["settings"]["wavelet"]
    return scattered(said, at, values) if name == "none" else wavelet(name, out, inner, at, values)


# Gains


def hira(t: Tensors, said: Said) -> Floats:
    if "hira_A" in t:
        product = exact(t["hira_B"].rows, t["hira_A"].rows)
    else:
        product = exact(turned(t["hira_embedding_A"].rows), turned(t["hira_embedding_B"].rows))
    return elementwise(said, lambda i, j: product[i][j] + 1.0)


def ia3(t: Tensors, said: Said) -> Floats:
    gains, shape = t["ia3_l"].floats, said["shape"]
    if said.get("settings", {}).get("inputs") is not True:
        return elementwise(said, lambda i, j: gains[i])
    kernel, groups = math.prod(shape[2:]), len(gains) // shape[1]
    outputs = shape[0] // groups
    return elementwise(said, lambda i, j: gains[i // outputs * shape[1] + j // kernel])


_PRODUCTS = (adalora, beft, delora, gralora, randlora, tinylora, unilora, vera, vblora)
PRODUCTS = {function.__name__ for function in _PRODUCTS} | {"vera-drawn", "pvera", "pvera-drawn"}
GAINS = {"hira", "ia3"}
FORMULAS: Mapping[str, Callable[[Tensors, Said], Any]] = {
    **{function.__name__: function for function in _PRODUCTS},
    **dict.fromkeys(("vera-drawn", "pvera", "pvera-drawn"), vera),
    **{f.__name__: f for f in (c3a, loha, lokr, miss, shira, supertuning, fourierft, waveft, hira, ia3)},
}
