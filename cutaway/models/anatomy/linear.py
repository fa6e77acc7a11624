"""Linear maps of a live model: the matrix and the bias that a module applies, whatever stands in it.

An ordinary linear module applies what it stores. Any other (an adapter, weights of another library, a forward of its
own) is asked: what it makes of the unit vectors is its matrix, if it is a linear map at all. A live adapter is so part
of what is read, and what cannot be read is refused, never passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.offload import offloaded, present

Map = tuple[Tensor, Tensor | None]  # [inputs outputs], and [outputs] or None
_ASKED: WeakKeyDictionary[nn.Module, tuple[Any, Map]] = WeakKeyDictionary()  # what was measured, and of which weights
_ROWS = 1024  # unit vectors at a time
_OWN = "cutaway."
MERGE = "merge the adapter (merge_and_unload()), or load the model unquantised and as transformers makes it"


def matrix(module: nn.Module) -> Float[Tensor, "inputs outputs"]:
    """Return the matrix that a linear module applies, inputs first; a view of the stored weight where that is it.

    Raises:
        Refused: the module is not a linear map (quantised activations, say).
    """
    return affine(module)[0]


def bias(module: nn.Module) -> Float[Tensor, "outputs"]:
    """Return the bias that a linear module adds, zeros where it has none."""
    w, b = affine(module)
    return b if b is not None else torch.zeros(w.shape[1], dtype=w.dtype, device=w.device)


def affine(module: nn.Module) -> Map:
    """Matrix, inputs first, and bias or None."""
    kept = stored(module)
    if kept is not None and (_ordinary(module) or kept[0].is_meta):
        return kept
    with torch.no_grad(), _at_rest(module):
        if kept is not None and not offloaded(module) and _agrees(module, kept):
            return kept
        asked, now = _ASKED.get(module), _stamp(module)
        if asked is not None and asked[0] == now and _agrees(module, asked[1]):
            return asked[1]
        made = _measured(module)
        _ASKED[module] = now, made
        return made


def stored(module: nn.Module) -> Map | None:
    """Return the weight and bias that lie in a module as numbers, if they do."""
    w, b = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(w, Tensor) or w.ndim != 2 or not w.is_floating_point() or w.is_quantized or packed(w):
        return None
    return (w if hasattr(module, "nf") else w.T), b if isinstance(b, Tensor) else None


def packed(w: Tensor) -> bool:
    """Return True if a tensor is of another library, which packs numbers in its own form (torchao, bitsandbytes)."""
    return type(w).__module__.split(".")[0] != "torch"


def has_bias(module: nn.Module | None) -> bool:
    """Return True if a module holds a bias, in whatever form."""
    own: Any = getattr(module, "bias", None)
    return (own() if callable(own) and not isinstance(own, Tensor) else own) is not None


def is_linear(module: nn.Module) -> bool:
    """Return True if a module looks like a linear map: it has two widths, or a weight with two axes."""
    if getattr(module, "num_embeddings", None) is not None:
        return False
    widths = (getattr(module, "in_features", None), getattr(module, "nx", None))
    return any(isinstance(n, int) for n in widths) or getattr(getattr(module, "weight", None), "ndim", 0) == 2


def table(module: nn.Module) -> Float[Tensor, "d_vocab d_model"]:
    """Return an embedding's stored rows.

    Raises:
        Refused: what the module returns is not those rows: an adapter stands on it, or it is quantised.
    """
    w = getattr(module, "weight", None)
    what = f"embeddings of {type(module).__name__}"
    if not isinstance(w, Tensor) or not w.is_floating_point():
        raise Refused(what, "they are not stored as numbers that can be read", MERGE)
    if packed(w):
        raise Refused(what, f"they are stored in another form ({type(w).__name__})", MERGE)
    if isinstance(module, nn.Embedding) and not _patched(module):
        return w  # transformers' own classes may scale what they return; these are the rows as stored
    with torch.no_grad(), _at_rest(module):
        given = _call(module, torch.arange(len(w), device=w.device))
    if given.shape != w.shape or not torch.equal(given, w):
        raise Refused(what, "what it returns is not what it stores: an adapter stands on it", MERGE)
    return w


def leading(hf: Any) -> Tensor:
    """Return the weight whose device and dtype are the model's: the embedding's, or where that is packed the first
    tensor.
    """
    return _leading(hf, hf.get_input_embeddings())


def _leading(hf: Any, embedding: Any) -> Tensor:
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    there = (*hf.parameters(), *hf.buffers())
    return next((t for t in there if t.is_floating_point()), torch.empty(0))


def home(hf: Any) -> torch.device:
    """Return the device that tokens go to: the embedding's, or where that is offloaded the one it runs on."""
    embedding = hf.get_input_embeddings()
    at = _leading(hf, embedding).device
    hook = embedding.__dict__.get("_hf_hook")
    runs = getattr(hook, "execution_device", None)
    return at if at.type != "meta" or runs is None else torch.device(runs)


def _ordinary(module: nn.Module) -> bool:
    """Return True if a module is known to apply the weights that it stores."""
    kind = type(module)
    plain = kind.forward is nn.Linear.forward or (kind.__name__, kind.__module__) == (
        "Conv1D",
        "transformers.pytorch_utils",
    )
    return plain and not _patched(module)


def _patched(module: nn.Module) -> bool:
    """Return True if a forward was put on this very module, other than accelerate's and our own."""
    own = module.__dict__.get("forward")
    if own is None or "_hf_hook" in module.__dict__:
        return False
    return not str(getattr(getattr(own, "func", own), "__module__", "")).startswith(_OWN)


def _agrees(module: nn.Module, known: Map) -> bool:
    """Return True if a module maps two vectors as this matrix and bias do, up to rounding."""
    w, b = known
    x = torch.randn(2, w.shape[0], generator=torch.Generator().manual_seed(0)).to(w.device, w.dtype)
    given = _call(module, x)
    if given.shape != (2, w.shape[1]):
        return False
    x, wide, own = x.double(), w.double(), 0.0 if b is None else b.double()
    most = 8 * max(torch.finfo(w.dtype).eps, 2e-7)
    size = x.abs() @ wide.abs() + (0.0 if b is None else b.double().abs())
    # Half precision rounds each product of an adapter; sums of many roundings grow with the root of their number.
    return bool(((given.double() - (x @ wide + own)).abs() <= most * size.clamp_min(1e-30)).all())


def _measured(module: nn.Module) -> Map:
    """Measure the matrix and bias of a module on zero and the unit vectors.

    Raises:
        Refused: its outputs on their sums show that it is not affine.
    """
    n = getattr(module, "in_features", None) or getattr(module, "nx", None)
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.empty(0))
    what = f"the matrix of {type(module).__name__}"
    if not isinstance(n, int):
        raise Refused(what, "it does not say how wide its input is", MERGE)
    if like.is_meta and not hasattr(module, "_hf_hook"):
        raise Refused(what, "its weights are not in memory", "load them")
    device = getattr(module.__dict__.get("_hf_hook"), "execution_device", None) or like.device
    kind = {"device": device if not like.is_meta or device != like.device else "cpu", "dtype": like.dtype}
    zero = _call(module, torch.zeros(1, n, **kind))[0]
    rows = [_call(module, torch.eye(n, **kind)[i : i + _ROWS]) - zero for i in range(0, n, _ROWS)]
    made: Map = torch.cat(rows), zero if bool(zero.any()) else None
    if not _agrees(module, made):
        raise Refused(what, "its output is no linear map of its input, so that there is none", MERGE)
    return made


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module's forward without the hooks that are on it."""
    try:
        with present(module):
            out = module.forward(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(f"the matrix of {type(module).__name__}", f"it cannot be asked for it: {said}", MERGE) from error
    return out[0] if isinstance(out, tuple) else out


def _stamp(module: nn.Module) -> tuple[Any, ...]:
    tensors = [*module.parameters(), *module.buffers()]
    return tuple((id(t), t._version, t.data_ptr()) for t in tensors if not t.is_meta)


@contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """Dropout of adapters off while open."""
    modes = [m for m in module.modules() if m.training]
    for m in modes:
        m.training = False
    try:
        yield
    finally:
        for m in modes:
            m.training = True
