"""A matrix as a product of two factors, with TransformerLens' names."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cutaway.compat.transformer_lens.utils import Mismatch, get_corner


class FactoredMatrix:
    """Product A @ B of A [… ldim mdim] and B [… mdim rdim], never multiplied out unless that is asked for.

    Attributes:
        A: the left factor, with the leading dimensions of both.
        B: the right factor.
        ldim, mdim, rdim: sizes of the left, the inner and the right dimension.
        shape: […, ldim, rdim].
        has_leading_dims: True if there are dimensions before these.
    """

    def __init__(self, A: Any, B: Any):
        _fit(A.shape, B.shape)
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.has_leading_dims = A.ndim > 2 or B.ndim > 2
        try:
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise RuntimeError(f"Shape mismatch: Cannot broadcast leading dimensions. {error}") from error
        self.shape = torch.Size((*leading, self.ldim, self.rdim))
        self.A, self.B = A.broadcast_to((*leading, *A.shape[-2:])), B.broadcast_to((*leading, *B.shape[-2:]))

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        if other.ndim < 2:
            return (self.A @ (self.B @ other.unsqueeze(-1))).squeeze(-1)
        _fit(self.shape, other.shape)
        return FactoredMatrix(self.A, self.B @ other) if self.rdim > self.mdim else FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Any) -> Any:
        _fit(other.shape, self.shape)
        if other.ndim < 2:
            return ((other.unsqueeze(-2) @ self.A) @ self.B).squeeze(-2)
        return FactoredMatrix(other @ self.A, self.B) if self.ldim > self.mdim else FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: float | Tensor) -> FactoredMatrix:
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise Mismatch(f"* by a tensor {tuple(scalar.shape)}", "only a scalar multiplies so", "use @ for matrices")
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def __getitem__(self, idx: Any) -> FactoredMatrix:
        index = list(idx) if isinstance(idx, tuple) else [idx]
        given, leading = sum(i is not None for i in index), len(self.shape) - 2
        if given > leading + 2:
            raise ValueError(f"{idx} is too long an index for a FactoredMatrix with shape {self.shape}")
        matrix = [_kept(i) for i in index[len(index) - max(0, given - leading) :]]  # of ldim and rdim
        front = index[: len(index) - len(matrix)]
        rows, columns = (*matrix, slice(None), slice(None))[:2]
        right = (*front, slice(None), columns) if len(matrix) == 2 else tuple(front)
        return FactoredMatrix(self.A[(*front, rows) if matrix else tuple(front)], self.B[right])

    def __repr__(self) -> str:
        return f"FactoredMatrix: Shape({self.shape}), Hidden Dim({self.mdim})"

    AB = property(lambda self: self.A @ self.B, doc="The product.")
    T = property(lambda self: FactoredMatrix(self.B.mT, self.A.mT), doc="The transpose.")
    U = property(lambda self: self._svd[0], doc="Left singular vectors [… ldim mdim].")
    S = property(lambda self: self._svd[1], doc="Singular values [… mdim].")
    V = property(lambda self: self._svd[2], doc="Right singular vectors [… rdim mdim].")
    ndim = property(lambda self: len(self.shape), doc="The number of axes.")
    pair = property(lambda self: (self.A, self.B), doc="Both factors.")

    @property
    def BA(self) -> Tensor:
        """The product in the other order, of a square matrix."""
        if self.rdim != self.ldim:
            raise Mismatch(f"BA of {self.shape}", "it is not square", "use AB")
        return self.B @ self.A

    @property
    def Vh(self) -> Tensor:
        """V itself, as there."""
        warnings.warn("FactoredMatrix.Vh is V, not its transpose: write V", DeprecationWarning, stacklevel=2)
        return self.V

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of AB [… mdim], which are those of BA."""
        return torch.linalg.eigvals(self.BA.float() if self.BA.dtype.itemsize < 4 else self.BA)

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        (ua, sa, vha), (ub, sb, vhb) = (torch.linalg.svd(x, full_matrices=False) for x in (self.A, self.B))
        um, s, vhm = torch.linalg.svd(sa[..., :, None] * vha @ ub * sb[..., None, :], full_matrices=False)
        return ua @ um, s, vhb.mT @ vhm.mT

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, S and V with U @ diag(S) @ Vᵀ = AB."""
        return self._svd

    def norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return self.S.pow(2).sum(-1).sqrt()

    def collapse_l(self) -> Tensor:
        """Return diag(S) @ Vᵀ [… mdim rdim]."""
        return self.S[..., :, None] * self.V.mT

    def collapse_r(self) -> Tensor:
        """Return U @ diag(S) [… ldim mdim]."""
        return self.U * self.S[..., None, :]

    def make_even(self) -> FactoredMatrix:
        """Return the same matrix with the singular values shared evenly between the factors."""
        root = self.S.sqrt()
        return FactoredMatrix(self.U * root[..., None, :], root[..., :, None] * self.V.mT)

    def get_corner(self, k: int = 3) -> Tensor:
        """Return the first `k` entries along every axis."""
        return get_corner(self.A[..., :k, :] @ self.B[..., :, :k], k)

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """Return the matrix with one more leading dimension."""
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))


class Circuits:
    """The circuits of what has weights of heads: an attention layer, or a model with those of all layers."""

    W_Q: Any
    W_K: Any
    W_V: Any
    W_O: Any

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_Kᵀ of every head."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head."""
        return FactoredMatrix(self.W_V, self.W_O)


def _fit(left: Any, right: Any) -> None:
    """Refuse a product of shapes whose inner dimensions differ."""
    if left[-1] != right[-2 if len(right) > 1 else -1]:
        shapes = f"their inner dimensions differ: {tuple(left)} and {tuple(right)}"
        raise Mismatch("product of factored matrices", shapes, "transpose one, or take other factors")


def _kept(i: Any) -> Any:
    """Return an index that keeps the axis."""
    return slice(i, i + 1 or None) if isinstance(i, int) else i
