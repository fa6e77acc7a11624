"""A faster forward of the same function, for runs over many tokens.

Three things waste time: float32 products that PyTorch gives to the slower of its processor libraries, weights that
oneDNN lays out again at every call, and activation functions written out in many steps that have a fused form. Inside
`FastKernels.running` they are exchanged; the model itself stays as it is. None is taken on trust: `FastKernels.choose`
compares one forward with the model's own and takes the most that stays within rounding, by that alone and not by the
clock, so the choice repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from cutaway.models.anatomy.anatomy import Anatomy

#: largest relative difference (norm over norm) of any tensor read from the model's own: what rounding adds up to
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ROOM = 1 << 31  # bytes that laid-out weights may take; larger models do without
_TANH: Callable[[Tensor], Tensor] = partial(gelu, approximate="tanh")
#: transformers' activation classes that are written out in steps, and the fused form of the same function
_FUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "NewGELUActivation": _TANH, "AccurateGELUActivation": _TANH, "FastGELUActivation": _TANH,
}  # fmt: skip
_ROWS = 1024  # the number of rows that the layout is made for; it is right for any


@dataclass(frozen=True)
class KernelChoice:
    """A choice of kernels for forwards.

    Attributes:
        fused: True to use fused activation functions.
        onednn: True to use oneDNN's float32 products.
        laid_out: True to lay out weights once.
        error: measured distance from the model's own forward.
    """

    fused: bool = False
    onednn: bool = False
    laid_out: bool = False
    error: float = 0.0


OWN = KernelChoice()  # the model's own


class FastKernels:
    """Faster kernels for the forwards of one model.

    `choose` finds kernels that agree with the model's own forward, and within `running(choice)` forwards use them. The
    object holds the weights that were laid out.
    """

    def __init__(self, anatomy: Anatomy):
        self.anatomy = anatomy
        self._layouts: dict[nn.Module, tuple[Tensor, int, Tensor]] = {}  # weight, its version, its layout

    def choose(self, read: Callable[[], Sequence[Tensor]]) -> KernelChoice:
        """Return the fastest choice that keeps what `read` reads within `TOLERANCE` of the model's own."""
        weight = self.anatomy.hf.get_input_embeddings().weight
        if weight.dtype not in TOLERANCE:
            return OWN
        fused, onednn, laid_out = bool(self._written_out()), self._can_onednn(), bool(self._linear())
        candidates = [
            KernelChoice(fused, onednn, laid_out),
            KernelChoice(fused, onednn),
            KernelChoice(False, onednn),
            KernelChoice(fused),
        ]
        with self.running(OWN):
            plain = read()
        for choice in dict.fromkeys(c for c in candidates if c != OWN):
            try:
                with self.running(choice):
                    error = max(_apart(x, y) for x, y in zip(read(), plain, strict=True))
            except RuntimeError:
                continue  # a processor or build of PyTorch that cannot
            if error <= TOLERANCE[weight.dtype]:
                return KernelChoice(choice.fused, choice.onednn, choice.laid_out, error)
        return OWN

    @contextmanager
    def running(self, choice: KernelChoice) -> Iterator[None]:
        """Within the block, run forwards with these kernels."""
        switch = onednn_switch()
        before = switch.fp32_precision if switch is not None else None
        exchanged = [*(self._written_out() if choice.fused else []), *(self._linear() if choice.laid_out else [])]
        try:
            for module, function in exchanged:
                module.__dict__["forward"] = function
            if switch is not None:
                switch.fp32_precision = "bf16" if choice.onednn else "none"
            yield
        finally:
            for module, _ in exchanged:
                module.__dict__.pop("forward", None)
            if switch is not None:
                switch.fp32_precision = before

    def _written_out(self) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """Return the activation modules that have a fused form and no forward of their own."""
        known = [(m, _FUSED[type(m).__name__]) for m in self.anatomy.hf.modules() if type(m).__name__ in _FUSED]
        return [(m, f) for m, f in known if "forward" not in m.__dict__]

    def _linear(self) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """Return the linear maps of the blocks, on layouts of their weights, if oneDNN is there and they fit."""
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available():
            return []
        free = (m for b in self.anatomy.blocks for m in b.modules() if "forward" not in m.__dict__)
        maps = [m for m in free if type(m) is nn.Linear or (type(m).__name__ == "Conv1D" and hasattr(m, "nf"))]
        weights: list[Any] = [m.weight for m in maps]
        fits = sum(w.numel() * w.element_size() for w in weights) <= ROOM
        right = all(w.device.type == "cpu" and w.dtype in TOLERANCE for w in weights)
        # float32 layouts are for oneDNN's products only.
        suits = all(w.dtype != torch.float32 for w in weights) or self._can_onednn()
        return [(m, partial(self._mapped, m)) for m in maps] if fits and right and suits else []

    def _mapped(self, module: Any, x: Tensor) -> Tensor:
        weight: Tensor = module.weight
        kept = self._layouts.get(module)
        if kept is None or kept[0] is not weight or kept[1] != weight._version:
            rows = weight.T.contiguous() if hasattr(module, "nf") else weight
            kept = weight, weight._version, torch.ops.mkldnn._reorder_linear_weight(rows.detach(), _ROWS)
            self._layouts[module] = kept
        flat = x.reshape(-1, x.shape[-1])
        return torch.ops.mkldnn._linear_pointwise(flat, kept[2], module.bias, "none", [], "").view(*x.shape[:-1], -1)

    def _can_onednn(self) -> bool:
        weight = self.anatomy.hf.get_input_embeddings().weight
        return weight.device.type == "cpu" and weight.dtype == torch.float32 and onednn_switch() is not None


def onednn_switch() -> Any:
    """Return PyTorch's switch for float32 products by oneDNN; None where there is none."""
    matmul = getattr(getattr(torch.backends, "mkldnn", None), "matmul", None)
    return matmul if torch.backends.mkldnn.is_available() and hasattr(matmul, "fp32_precision") else None


def _apart(x: Tensor, y: Tensor) -> float:
    """Return the norm of the difference over the norm; infinite where either is not finite."""
    x, y = x.float(), y.float()
    error = float((x - y).norm() / y.norm().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf
