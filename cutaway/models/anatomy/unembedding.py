"""Unembedding: how a model's own logits follow from its last residual stream, measured on the model itself.

Families scale, cap, shift or cut their logits in a forward of their own, and some divide or project the stream before
the head reads it. Names in a configuration do not tell which (Granite divides by what HyperCLOVAX multiplies with), so
one small forward does: known numbers take the place of the final norm's output and of the head's output, and what
arrives behind each is compared with

    head's input = gain · (the modules between final norm and head)(final norm(last stream))
    logits       = cap · tanh(scale · head's output / cap)     (without a cap: scale · head's output)

Where a model is not of this form, `before` or `after` says so: the lens and direct attribution refuse with it, and
sweeps leave the unembedding to the model's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.core.refuse import Refused
from cutaway.models.access import taps
from cutaway.models.access.forward import alone, evaluating
from cutaway.models.access.positions import FRAME
from cutaway.models.access.reading import Seen
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.offload import offloaded

FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, Refused)
_SIZES = (0.0, 1e-4, 1.0, 30.0, 3e4)  # of the known numbers in the head's place: no cap is seen at the small ones
UNEMBEDDED = "unembedding"  # the name under which the self-check can disable lenses and shares
_IDLE = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Unembedding:
    """The way from the last residual stream to the logits.

    `between`: modules after the final norm, in the order in which they run. `width`: how many of the head's outputs
    are logits. `before` and `after`: why what the head reads, or what is made of its output, is not of the form above;
    empty where it is.
    """

    head: nn.Module
    final: nn.Module | None
    between: tuple[nn.Module, ...] = ()
    gain: float = 1.0
    scale: float = 1.0
    cap: float | None = None
    width: int | None = None
    before: str = ""
    after: str = ""

    @property
    def why(self) -> str:
        """Why no logits can be read off a stream out of turn; empty where they can."""
        return self.before or self.after

    @property
    def linear(self) -> bool:
        """True if the head reads a linear map of the final norm's output."""
        return not self.before and all(isinstance(m, nn.Linear) for m in self.between)

    def logits(self, x: Float[Tensor, "*rest d_head_in"], capped: bool = True) -> Float[Tensor, "*rest token"]:
        """Return the logits of what the head reads, as the model itself makes them; `capped=False` leaves out the
        soft cap.
        """
        return self._scaled(self.head(x)[..., : self.width], capped)

    def _scaled(self, y: Float[Tensor, "*rest token"], capped: bool = True) -> Float[Tensor, "*rest token"]:
        y = y * self.scale if self.scale != 1.0 else y
        return self.cap * torch.tanh(y / self.cap) if capped and self.cap else y

    def seen(self, x: Float[Tensor, "row d_head_in"], columns: Int[Tensor, "token"] | None = None) -> Seen:
        """Return the last logits of what the head reads, as measurements take them; of some tokens, if `columns` are
        given.
        """
        if columns is None:
            return Seen(self.logits(x))
        columns = columns.to(x.device)
        return Seen(self._logits_of(x, columns), columns=columns)

    def _logits_of(
        self, x: Float[Tensor, "row d_head_in"], columns: Int[Tensor, "token"]
    ) -> Float[Tensor, "row token"]:
        """Return the logits of some tokens; without the products of all others where the head is a plain matrix."""
        head = self.head
        if not isinstance(head, nn.Linear) or not _plain(head):
            return self.logits(x)[..., columns]
        bias = None if head.bias is None else head.bias[columns]
        return self._scaled(nn.functional.linear(x, head.weight[columns], bias))

    def read(
        self, x: Float[Tensor, "*rest d_model"], norm: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "*rest d_head_in"]:
        """Return the head's input if `x` were the last residual stream; `norm` takes the place of the final norm."""
        norm = norm or self.final
        y = norm(x) if norm is not None else x
        for m in self.between:
            y = m(y)
        return y * self.gain if self.gain != 1.0 else y


def unembedding(anatomy: Anatomy) -> Unembedding:
    """Return the way of a model, measured when it is first asked for and again when its head or final norm is
    exchanged.

    Raises:
        Refused: the model has no unembedding.
    """
    head = anatomy.unembed
    if head is None:
        raise Refused("logits", "this model has no unembedding", "capture its residual stream instead")
    return anatomy.remember(("unembedding", head), lambda: _measure(anatomy, head, anatomy.top("final")))


def readable(anatomy: Anatomy, what: str) -> Unembedding:
    """Return the way of a model of which logits can be read at any depth.

    Raises:
        Refused: it has no unembedding, or one that does not read its residual stream in a known way.
    """
    way = unembedding(anatomy)
    if why := way.why or anatomy.disabled.get(UNEMBEDDED, ""):
        raise Refused(what, why, "read the model's own logits: run or run_last")
    return way


def _plain(head: nn.Linear) -> bool:
    """Return True if the matrix and the bias of a head are all that takes part in its output."""
    own = type(head) is nn.Linear and type(head.weight) is nn.Parameter and "forward" not in vars(head)
    return own and not (head.weight.is_meta or head._forward_hooks or head._forward_pre_hooks)


@dataclass
class _Trial:
    """Tensors seen in one forward, and the known numbers that replaced them.

    Attributes:
        stream: the last residual stream.
        normed: input of the final norm.
        given: the known numbers behind the final norm.
        read: input of the head.
        ramp: the known numbers behind the head.
        logits: the output.
        between: linear maps between the final norm and the head.
    """

    stream: Tensor | None = None
    normed: Tensor | None = None
    given: Tensor | None = None
    read: Tensor | None = None
    ramp: Tensor | None = None
    logits: Tensor | None = None
    between: list[nn.Module] = field(default_factory=list)


def _measure(anatomy: Anatomy, head: nn.Module, final: nn.Module | None) -> Unembedding:
    if any(p.is_meta for p in head.parameters()) and not offloaded(head):
        return Unembedding(head, final)  # sizes without numbers
    seen, fault = _Trial(), ""
    for exact in (True, False):  # modules between norm and head may not take float32 in a model of half precision
        try:
            seen = _forward(anatomy, head, final, exact)
            break
        except FAULTS as error:
            fault = f"it could not be measured: {type(error).__name__}: {error}".splitlines()[0]
    if seen.logits is None:
        return Unembedding(head, final, before=fault, after=fault)
    between = tuple(m for m in seen.between if not any(m is not o and m in set(o.modules()) for o in seen.between))
    gain, before = _before(seen, between)
    scale, cap, after = _after(seen)
    return Unembedding(head, final, between, gain, scale, cap, seen.logits.shape[-1], before, after)


def _before(seen: _Trial, between: tuple[nn.Module, ...]) -> tuple[float, str]:
    """Return the gain of the head's input, and why it does not follow from the last stream."""
    if seen.read is None or seen.given is None or seen.stream is None:
        return 1.0, "its final norm or its unembedding did not run"
    if seen.normed is not None and not same(seen.normed, seen.stream):
        return 1.0, "what its final norm reads is not the output of its last block"
    y = seen.given
    with torch.no_grad():
        for m in between:
            y = m(y)
    if y.shape != seen.read.shape:
        return 1.0, "what its unembedding reads is not made of its final norm's output"
    gain = ratio(seen.read, y)
    if not same(seen.read, gain * y.double()):
        return 1.0, "what its unembedding reads does not follow from its final norm's output alone"
    return gain, ""


def _after(seen: _Trial) -> tuple[float, float | None, str]:
    """Scale and cap of the head's output, and why the logits are not of that form."""
    assert seen.logits is not None
    if seen.ramp is None or seen.logits.shape[-1] > seen.ramp.shape[-1]:
        return 1.0, None, "its logits are not what its unembedding returns"
    x, y = seen.ramp[..., : seen.logits.shape[-1]], seen.logits
    scale = ratio(y[x.abs() < 1e-3], x[x.abs() < 1e-3])
    x, y = x.double(), y.double()
    top, cap = y.abs().max(), None
    if scale and top < 0.9 * abs(scale) * x.abs().max():
        cap = float(top)
        for _ in range(60):  # the largest number lies in the cap's flat part, or near it
            cap = float(top / torch.tanh(abs(scale) * x.abs().max() / cap))
    made = cap * torch.tanh(scale * x / cap) if cap else scale * x
    near = 4 * torch.finfo(seen.logits.dtype).eps
    if not bool(scale) or not bool(((made - y).abs() <= near * made.abs().clamp_min(1e-6)).all()):
        return 1.0, None, "its logits are not its unembedding's output, scaled or softly capped"
    return scale, cap, ""


def ratio(a: Tensor, b: Tensor) -> float:
    """c of a = c · b, exactly 1 where it is 1 but for rounding."""
    eps, a, b = 4 * torch.finfo(a.dtype).eps, a.double(), b.double()
    c = float((a * b).sum() / b.pow(2).sum().clamp_min(1e-300))
    return 1.0 if abs(c - 1.0) < eps else c


def same(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors hold the same numbers, whatever their shape."""
    a, eps = a.reshape(-1), 4 * torch.finfo(a.dtype).eps
    b = b.reshape(-1)
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= eps * a.double().abs().max())


def _forward(anatomy: Anatomy, head: nn.Module, final: nn.Module | None, exact: bool) -> _Trial:
    """Run one forward of two tokens, with known numbers behind final norm and head."""
    seen, table = _Trial(), anatomy.hf.get_input_embeddings().weight
    g = torch.Generator().manual_seed(0)

    def block(module: nn.Module, args: Any, out: Any) -> Any:
        seen.stream = x = taps.tensor_of(out)
        return None if final is not None else taps.with_tensor(out, known(x))

    def known(like: Tensor) -> Tensor:
        # Numbers of eight bits, so that no cast on the way rounds them.
        numbers = torch.randn(like.shape, generator=g).to(torch.bfloat16)
        seen.given = numbers.to(like.device, torch.float32 if exact else like.dtype)
        return seen.given

    def norm(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.normed, seen.between = args[0], []
        return known(out)

    def entering(module: nn.Module, args: Any) -> Any:
        seen.read = args[0]
        return (torch.zeros(args[0].shape, dtype=own, device=args[0].device), *args[1:])

    def leaving(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        n = torch.arange(out.shape[-1])
        sizes = (
            torch.tensor(_SIZES)[n % len(_SIZES)] * (1 - 2 * (n // len(_SIZES) % 2)) * (1 + 0.3 * torch.sin(n * 1.0))
        )
        seen.ramp = sizes.to(out.device).expand(out.shape)
        return seen.ramp.clone()

    def ran(module: nn.Module, args: Any, out: Any) -> None:
        if seen.given is not None and seen.read is None:
            seen.between.append(module)

    own: torch.dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), table.dtype)
    hooks: list[tuple[Callable[..., Any], Any]] = [
        (anatomy.blocks[-1].register_forward_hook, block),
        (head.register_forward_pre_hook, entering),
        (head.register_forward_hook, leaving),
        *((m.register_forward_hook, ran) for m in _others(anatomy, head, final)),
    ]
    if final is not None:
        hooks.append((final.register_forward_hook, norm))
    with ExitStack() as stack:
        for register, hook in hooks:
            stack.callback(register(hook).remove)
        seen.logits = quietly(anatomy)
    return seen


def quietly(anatomy: Anatomy) -> Tensor:
    """Return the logits of one forward of two tokens that belongs to no run: unseen by taps and frames, and not
    counted.
    """
    device = anatomy.hf.get_input_embeddings().weight.device
    ids = torch.arange(2, device=device)[None] % anatomy.shape.d_vocab
    kw = {"use_cache": False} if "use_cache" in inspect.signature(type(anatomy.hf).forward).parameters else {}
    token = FRAME.set(None)
    try:
        with alone(anatomy.hf), evaluating(anatomy), taps.asleep(anatomy), torch.no_grad():
            out = anatomy.hf(ids, **kw)
    finally:
        FRAME.reset(token)
    return out.logits if getattr(out, "logits", None) is not None else out[0]


def _others(anatomy: Anatomy, head: nn.Module, final: nn.Module | None) -> list[nn.Module]:
    """Return the modules that may stand between final norm and head: no block, nor anything that holds or belongs to
    one.
    """
    blocks = set(anatomy.blocks)
    inside = {m for b in blocks for m in b.modules()}
    rest = [m for m in anatomy.hf.modules() if m not in inside and m not in (head, final) and not isinstance(m, _IDLE)]
    return [m for m in rest if not {head, *blocks} & set(m.modules())]
