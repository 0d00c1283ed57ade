"""Damping: what is added to the diagonal of a second moment, always as a share of its own mean diagonal.

A moment of few or of equal inputs is singular, and rounding can even make it slightly indefinite. ``damped`` makes it positive
definite for any data, and ``cholesky`` and ``solve`` cannot fail for a finite matrix. All shares stand here, but
those of rounding, which are chosen by measurement (``rounding.choice``).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hpr.errors import HprError

INPUT = 1e-3  # of the moment of a site's inputs, or of the gradients of a table
OUTPUT = 0.05  # larger: directions without gradient cost nothing to first order only, so fits must not use them freely
REGRESSION = 1e-3  # of the inputs of a refit: pulls towards the original weight
PRECONDITIONER = 1e-6  # of the mean moments of sites that share a matrix
DERIVED = 1e-9  # of moments and systems that are made of damped ones
BASIS = 1e-12  # of the Gram matrix of basis vectors that are nearly orthogonal
FLOAT32 = 1e-6  # of a second moment summed in float32: what rounding leaves of it where centring takes off all the rest
NOTHING = 1e-100  # for a moment of zeros: far below any real one, and neither its square nor its inverse leaves float64

_FIRST_RIDGE = 1e-15  # of the mean diagonal, times the size of the matrix: what rounding may take from a smallest eigenvalue


def damped(moment: Float[Tensor, "n n"] | Float[Tensor, " n"], share: float) -> Float[Tensor, "n n"] | Float[Tensor, " n"]:
    """The moment (n, n), or a diagonal one (n,), plus ``share`` of its mean diagonal. Rounding's negative variances count as 0.

    >>> damped(torch.tensor([1.0, 3.0]), 0.5).tolist()
    [2.0, 4.0]
    """
    if moment.dim() == 1:
        variances = moment.clamp(min=0)
        return variances + (share * float(variances.mean()) + NOTHING)
    variances = moment.diagonal()
    lifted = (-variances).clamp(min=0) + (share * float(variances.clamp(min=0).mean()) + NOTHING)
    return moment + torch.diag(lifted)


def cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The lower factor L with L Lᵀ = matrix, for a symmetric matrix that is positive definite but for rounding.

    Where it is not, the least power of ten of its mean diagonal is added that makes it so. Raises ``HprError`` for numbers that
    are not finite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if not int(info) and bool(torch.isfinite(lower).all()):
        return lower
    if not bool(torch.isfinite(matrix).all()):
        raise HprError(
            "a second moment is not finite, because activations or gradients are too large for float32: check the weights "
            "and the data"
        )
    scale = float(matrix.abs().sum(1).mean()) + NOTHING
    ridge = _FIRST_RIDGE * len(matrix) * scale
    while int(info) or not bool(torch.isfinite(lower).all()):  # ends: a dominant diagonal is positive definite
        lower, info = torch.linalg.cholesky_ex(matrix + torch.diag(torch.full_like(matrix[0], ridge)))
        ridge *= 10
    return lower


def solve(matrix: Float[Tensor, "n n"], right: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """matrix⁻¹ · right for a symmetric positive semidefinite matrix. See ``cholesky`` for one that is nearly singular."""
    return torch.cholesky_solve(right, cholesky(matrix))
