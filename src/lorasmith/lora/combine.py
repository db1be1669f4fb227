"""Combining adapters: one adapter for a weighted sum of several, layer by layer, from their matrices alone.

    S = sum_i w_i s_i B_i A_i          the exact sum, of rank K = sum_i R_i at most

    cat                          B = [B_1 ... B_N], A = [w_1 s_1 A_1; ...]: equal to S
    svd                          the closest to S of a given rank (Eckart-Young)
    linear, ties, dare_*, ...    PEFT's: A and B are combined apart, so B A has the products of B_i and A_j too
    *_svd                        PEFT's: the rule is applied to each w_i s_i B_i A_i, and the result cut to a rank

`S` is never formed: with Q_B R_B = [B_i], Q_A R_A = [w_i s_i A_i]^T, S = Q_B (R_B R_A^T) Q_A^T, where the middle is
[K, K]. Only the rules that prune B A form it, for one layer at a time. Methods are named as in PEFT's
`add_weighted_adapter`.

    I = in_features, O = out_features, R = rank; matrices A_RI and B_OR; all arithmetic is in float64
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorasmith.errors import AdapterError
from lorasmith.i18n import _, listed
from lorasmith.lora.sparsify import Sparsifier, sparsifier

DENSE = 2048  # up to this many rows or columns, a dense matrix is cut to a rank exactly
OVERSAMPLE, ITERATIONS = 32, 8  # above, by subspace iteration (arXiv:0909.4061, algorithm 4.4)


@dataclass(frozen=True)
class Factors:
    """The update s B A of one layer: A [R, I], B [O, R]. Of an embedding, A is [R, V] and B [H, R]."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """R."""
        return len(self.A_RI)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), the shape of B A."""
        return self.B_OR.shape[0], self.A_RI.shape[1]

    def delta(self) -> Tensor:
        """s B A [O, I], in the dtype of B."""
        return self.B_OR @ self.A_RI.to(self.B_OR.dtype) * self.scaling


Part = tuple[Factors, float]  # the update of one adapter, and its weight


@dataclass(frozen=True)
class LayerError:
    """The Frobenius norms of the exact sum in one layer, and of the difference between the result and that sum."""

    path: str
    error: float
    norm: float

    @property
    def relative(self) -> float:
        """error / norm; 0 if both are 0."""
        return relative_error([self])


def relative_error(layers: Sequence[LayerError]) -> float:
    """The relative Frobenius error over these layers together."""
    error, norm = (math.hypot(*sizes) for sizes in ([x.error for x in layers], [x.norm for x in layers]))
    return 0.0 if error == 0 else math.inf if norm == 0 else error / norm


def combine(
    adapters: Sequence[tuple[Mapping[str, Factors], float]],
    method: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: Generator | None = None,
    order: Iterable[str] = (),
) -> Iterator[tuple[str, Factors]]:
    """One adapter for several: the path of each layer that any of them adapts, and its update there, with scaling 1.

    Args:
        adapters: the updates of each adapter by the path of the layer, and its weight.
        method: as in PEFT's `add_weighted_adapter`; see the docstring of this module.
        rank: of the result in each layer, for svd and *_svd; by default the largest rank of any of the adapters.
        density: the share of values that ties, dare_* and magnitude_prune keep.
        majority_sign_method: of ties and dare_ties, "total" or "frequency".
        generator: of dare_*; torch's global one if None. With the same seed, the masks are those of PEFT, except for
            dare_*_svd in embeddings and Conv1D, where PEFT draws them for the transposed product.
        order: the paths in the order in which dare_* draws, such as that of the model, which PEFT uses; other layers
            follow.

    The rank may differ between layers; see `padded`. Results are float32, or float64 if the adapters are.

    Raises AdapterError that names the layer: the adapters' shapes differ there, or the ranks, if the method combines
    A and B value by value.
    """
    rule = sparsifier(method.removesuffix("_svd"), density, majority_sign_method, generator)
    rank = rank or max((factors.rank for layers, _weight in adapters for factors in layers.values()), default=1)
    layers = parts_by_layer(adapters)
    paths = dict.fromkeys([path for path in order if path in layers] + list(layers))
    for path in paths:
        yield path, _combine_layer(path, layers[path], method, rank, rule)


def parts_by_layer(adapters: Sequence[tuple[Mapping[str, Factors], float]]) -> dict[str, list[Part]]:
    """For each layer, the updates and weights of the adapters that have one. Raises AdapterError if shapes differ."""
    found: dict[str, list[Part]] = {}
    for layers, weight in adapters:
        for path, factors in layers.items():
            found.setdefault(path, []).append((factors, weight))
    problems = [
        _(
            "{path}: the adapters belong to different base models: this layer has the shapes {shapes}.",
            path=path,
            shapes=listed(sorted({str(factors.shape) for factors, _weight in parts})),
        )
        for path, parts in found.items()
        if len({factors.shape for factors, _weight in parts}) > 1
    ]
    if problems:
        raise AdapterError(problems[0])  # the other layers say the same
    return found


@torch.no_grad()
def _combine_layer(path: str, parts: Sequence[Part], method: str, rank: int, rule: Sparsifier) -> Factors:
    """The combined update of the layer at `path`. Raises AdapterError if the ranks must be equal, and are not."""
    dtype = torch.float32
    for factors, _weight in parts:
        dtype = torch.promote_types(torch.promote_types(dtype, factors.A_RI.dtype), factors.B_OR.dtype)
    O, I = parts[0][0].shape
    if method == "cat" and sum(factors.rank for factors, _weight in parts) <= min(O, I):
        A, B = _stacked(parts)
    elif method in ("cat", "svd"):
        A, B = _closest(*_stacked(parts), min(O, I) if method == "cat" else rank)
    elif method.endswith("_svd"):
        A, B = _cut(rule([factors.delta() for factors, _w in parts], [weight for _f, weight in parts]), rank)
    else:
        A, B = _by_value(path, parts, method, rule)
    return Factors(A.to(dtype).contiguous(), B.to(dtype).contiguous())


def _stacked(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """A [K, I] and B [O, K] whose product is the exact sum."""
    A = torch.cat([factors.A_RI.double() * (weight * factors.scaling) for factors, weight in parts])
    return A, torch.cat([factors.B_OR.double() for factors, _weight in parts], dim=1)


def _closest(A_KI: Tensor, B_OK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of `rank` at most with the product closest to B A in the Frobenius norm."""
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B_OK), torch.linalg.qr(A_KI.t())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    return Vh[:rank] @ Q_A.t(), Q_B @ (U[:, :rank] * S[:rank])


def _cut(D_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of `rank` at most with the product closest to D, or nearly so if both sides of D exceed `DENSE`.

    The best product is U U^T D, where U are the leading eigenvectors of D D^T: ten times faster than an SVD of D.
    """
    if D_OI.shape[0] > D_OI.shape[1]:
        B_IR, A_RO = _cut(D_OI.t(), rank)
        return A_RO.t(), B_IR.t()
    Q = _range(D_OI, rank) if len(D_OI) > max(DENSE, 2 * (rank + OVERSAMPLE)) else None
    small = D_OI if Q is None else Q.t() @ D_OI
    U = torch.linalg.eigh(small @ small.t()).eigenvectors.flip(1)[:, :rank]
    return U.t() @ small, U if Q is None else Q @ U


def _range(D_OI: Tensor, rank: int) -> Tensor:
    """An orthonormal basis [O, rank + OVERSAMPLE] of what D mostly maps to; the same in every run."""
    start = torch.randn(D_OI.shape[1], rank + OVERSAMPLE, generator=torch.Generator().manual_seed(0), dtype=D_OI.dtype)
    Q: Tensor = torch.linalg.qr(D_OI @ start).Q
    for _iteration in range(ITERATIONS):
        Q = torch.linalg.qr(D_OI @ torch.linalg.qr(D_OI.t() @ Q).Q).Q
    return Q


def _by_value(path: str, parts: Sequence[Part], method: str, rule: Sparsifier) -> tuple[Tensor, Tensor]:
    """A and B combined apart, each with the square root of the weight, and its sign in A."""
    ranks = sorted({factors.rank for factors, _weight in parts})
    if len(ranks) > 1:
        raise AdapterError(
            _(
                "{path}: the adapters have the ranks {ranks}, but {method} combines their matrices value by value. Use "
                "{other}, which allows different ranks.",
                path=path,
                ranks=listed(map(str, ranks)),
                method=method,
                other=_("cat or svd") if method == "linear" else f"{method}_svd",
            )
        )
    scales = [weight * factors.scaling for factors, weight in parts]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    A = rule(
        [factors.A_RI for factors, _weight in parts], [math.copysign(r, s) for r, s in zip(roots, scales, strict=True)]
    )
    return A, rule([factors.B_OR for factors, _weight in parts], roots)


@torch.no_grad()
def layer_error(path: str, parts: Sequence[Part], combined: Factors) -> LayerError:
    """How far the combined update is from the exact sum, from the factors alone."""
    A, B = _stacked(parts)
    wrong = _norm(torch.cat([A, combined.A_RI.double() * -combined.scaling]), torch.cat([B, combined.B_OR.double()], 1))
    return LayerError(path, wrong, _norm(A, B))


def _norm(A_KI: Tensor, B_OK: Tensor) -> float:
    """||B A||, without forming B A."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(B_OK).R @ torch.linalg.qr(A_KI.t()).R.t()))


def padded(factors: Factors, rank: int) -> Factors:
    """The same update with a larger rank: A and B with zeros appended."""
    more = rank - factors.rank
    A, B = factors.A_RI, factors.B_OR
    A = torch.cat([A, A.new_zeros(more, A.shape[1])])
    return Factors(A, torch.cat([B, B.new_zeros(len(B), more)], dim=1), factors.scaling)
