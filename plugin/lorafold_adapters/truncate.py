"""The nearest low-rank product of a matrix, and how near it is: pure arithmetic, in fp32.

Shapes in the names: N rows and M columns of the matrix, R rank, Q columns of a random sketch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SIZE = 512
"""Matrices whose smaller side is at most this are decomposed exactly: that takes well under a second."""
OVERSAMPLING, POWER_ITERATIONS = 16, 4
"""Halko et al. 2011 find 5 to 10 and 1 or 2 enough where singular values fall quickly; those of TIES do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncated:
    """`left right`, in place of a matrix."""

    left_NR: Tensor
    right_RM: Tensor
    squares: float
    """Sum of the squares of the matrix."""
    lost_squares: float
    """Of what `left right` leaves of it."""

    @property
    def product(self) -> Tensor:
        """The matrix [N, M] again."""
        return self.left_NR @ self.right_RM


def truncated(matrix_NM: Tensor, rank: int) -> Truncated:
    """The best approximation of that rank (Eckart and Young 1936); of big matrices nearly the best, seeded.

    The error is measured on the result, so it is right in both cases.
    """
    smaller = min(matrix_NM.shape)
    rank = min(rank, smaller)
    if smaller <= EXACT_SIZE or rank + OVERSAMPLING >= smaller:
        left_NQ, values_Q, right_QM = torch.linalg.svd(matrix_NM, full_matrices=False)
    else:
        left_NQ, values_Q, right_QM = sketched_svd(matrix_NM, rank + OVERSAMPLING)
    left_NR, right_RM = shared_out(left_NQ[:, :rank], values_Q[:rank], right_QM[:rank])
    lost_NM = torch.addmm(matrix_NM, left_NR, right_RM, alpha=-1)
    return Truncated(
        left_NR=left_NR, right_RM=right_RM, squares=sum_of_squares(matrix_NM), lost_squares=sum_of_squares(lost_NM)
    )


def truncated_product(left_NQ: Tensor, right_QM: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors [N, R] and [R, M] of the best approximation of `left right`, which is never formed."""
    left_basis_NQ, left_QQ = torch.linalg.qr(left_NQ)
    right_basis_MQ, right_QQ = torch.linalg.qr(right_QM.T)
    inner_left, values, inner_right = torch.linalg.svd(left_QQ @ right_QQ.T, full_matrices=False)
    rank = min(rank, values.numel())
    left_NR, right_RM = left_basis_NQ @ inner_left[:, :rank], inner_right[:rank] @ right_basis_MQ.T
    return shared_out(left_NR, values[:rank], right_RM)


def sketched_svd(matrix_NM: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomised SVD (Halko et al. 2011, algorithms 4.4 and 5.1), with a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    sketch_MQ = torch.randn(matrix_NM.shape[1], columns, generator=generator).to(matrix_NM)
    basis_NQ = torch.linalg.qr(matrix_NM @ sketch_MQ).Q
    for _ in range(POWER_ITERATIONS):
        basis_MQ = torch.linalg.qr(matrix_NM.T @ basis_NQ).Q
        basis_NQ = torch.linalg.qr(matrix_NM @ basis_MQ).Q
    left, values, right = torch.linalg.svd(basis_NQ.T @ matrix_NM, full_matrices=False)
    return basis_NQ @ left, values, right


def shared_out(left_NR: Tensor, values_R: Tensor, right_RM: Tensor) -> tuple[Tensor, Tensor]:
    """Gives each factor the root of the singular values: what is cast to 16 bits afterwards is of one size."""
    roots_R = values_R.sqrt()
    return (left_NR * roots_R).contiguous(), (right_RM * roots_R.unsqueeze(1)).contiguous()


def sum_of_squares(values: Tensor) -> float:
    """Exact enough for a ratio."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float32)) ** 2
