"""Identity of a model: its modules and their settings, whatever is attached to them, and every byte of its weights.

Two models of one configuration may differ in all of it: an adapter, quantised maps, a hook of another library, a
forward that was put on one module. What is kept about a model (its self-check, a sweep half done) is kept under this.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cutaway.core.content import content
from cutaway.core.record import hash_tensors, hash_text
from cutaway.core.refuse import Refused
from cutaway.models.anatomy.offload import offloaded
from cutaway.models.loading.adapters import live

# What PyTorch keeps in every module, and what does not bear on the numbers.
_PLUMBING = {*nn.Module().__dict__, "name_or_path", "generation_config", "gradient_checkpointing", "warnings_issued",
             "forward", "_old_forward", "_hf_hook"}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# taps of this package come and go; the hooks by which transformers shows hidden states stay once it was asked for them
_PASSIVE = ("cutaway.", "transformers.utils.output_capturing")
_WRITTEN_BY_FORWARD = ("dynamic", "longrope")  # rotary frequencies that follow the last prompt's length
_SAVING = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")  # written when saved
_TOKENS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
# The rewrites of weights that are active on a model at present, in order (`models.edits.rewrites`).
REWRITES: WeakKeyDictionary[Any, list[dict[str, Any]]] = WeakKeyDictionary()
# What the weights of a model were before they were loaded, where they were something else (`models.loading`).
ORIGINS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def beside(hf: nn.Module) -> dict[str, Any]:
    """Return what a record says of a model's weights beside their hash: origin, adapters, active rewrites."""
    found = {"origin": ORIGINS.get(hf), "adapters": live(hf), "rewrites": list(REWRITES.get(hf, ()))}
    return {key: value for key, value in found.items() if value}


def described(hf: nn.Module) -> tuple[str, list[str]]:
    """Return every module with its type, plain settings, hooks and own forward, in order; and where what is attached
    cannot be read.

    That enters by a token, which lasts as long as the object. Taps of this package, which come and go, and hooks
    that only show hidden states are not counted.
    """
    lines, unread, configurations = [], list[str](), dict[int, str]()
    for name, module in hf.named_modules(remove_duplicate=False):
        parts = [name, f"{type(module).__module__}.{type(module).__qualname__}"]
        bookkeeping = any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__)
        rotary = "rope_type" in module.__dict__
        for key, value in module.__dict__.items():
            if key in _PLUMBING or (bookkeeping and key.startswith("_")) or (rotary and key == "max_seq_len_cached"):
                continue
            if hasattr(value, "to_dict"):
                if id(value) not in configurations:
                    configurations[id(value)] = configured(value)
                parts.append(configurations[id(value)])
            else:
                parts.append(f"{key}={_plain(value) or type(value).__qualname__}")
        for attached in _attached(module):
            try:
                parts.append(content(attached))
            except Refused:
                parts.append(_token(attached))
                unread.append(name or "the model")
        lines.append("|".join(parts))
    return "\n".join(lines), unread


def configured(config: Any) -> str:
    """Return a configuration as text: its fields and the attention implementation, without what saving adds."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _SAVING}
    return f"{sorted(fields.items(), key=str)}{getattr(config, '_attn_implementation', '')}"


def _attached(module: nn.Module) -> Iterator[Any]:
    """Hooks and a forward of the module's own; accelerate's wrapper by the settings of the hook that it holds."""
    own = [f for kind in _HOOKS for f in module.__dict__[kind].values()]
    if "_hf_hook" in module.__dict__:
        hook = module.__dict__["_hf_hook"]
        yield [type(hook), {k: v for k, v in vars(hook).items() if _plain(v) is not None}]
    elif "forward" in module.__dict__:
        own.append(module.__dict__["forward"])
    for f in own:
        inner = f.func if isinstance(f, partial) else f
        if not str(getattr(inner, "__module__", "")).startswith(_PASSIVE):
            yield f


def _plain(value: Any, depth: int = 0) -> str | None:
    """Return a value of numbers and texts, or None for any other."""
    if value is None or isinstance(value, int | float | complex | str | bytes | torch.dtype | torch.device):
        return repr(value)
    if depth > 4:
        return None
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_plain(v, depth + 1) for v in value]
        if isinstance(value, set | frozenset):
            parts.sort(key=str)
        return None if None in parts else f"[{','.join(map(str, parts))}]"
    return None


def _token(f: Any) -> str:
    """Return a token of one object for as long as it lives; a new one each time where it cannot be kept."""
    try:
        return _TOKENS.setdefault(getattr(f, "__func__", f), secrets.token_hex(8))
    except TypeError:
        return secrets.token_hex(8)


def tensors(hf: nn.Module) -> dict[str, Any]:
    """Return every parameter, buffer and packed weight under its name; rotary frequencies that each forward writes
    are not.
    """
    found: dict[str, Any] = _unpacked(hf) if _repacks(hf) else hf.state_dict(keep_vars=True)
    for name, module in hf.named_modules(remove_duplicate=False):
        passing = any(word in str(module.__dict__.get("rope_type")) for word in _WRITTEN_BY_FORWARD)
        for key, buffer in module._buffers.items():
            path = f"{name}.{key}" if name else key
            if passing:
                found.pop(path, None)
            elif buffer is not None:
                found[path] = buffer
    return found


def _repacks(hf: nn.Module) -> bool:
    """Return True if saving would change the model: bitsandbytes repacks 4-bit weights as it saves, with loss."""
    return any(type(m).__module__.split(".")[0] == "bitsandbytes" for m in hf.modules())


def _unpacked(hf: nn.Module) -> dict[str, Any]:
    """Return parameters and buffers as they lie, each with what its library keeps beside it to read it."""
    found: dict[str, Any] = dict(hf.named_parameters(remove_duplicate=False))
    for name, p in list(found.items()):
        state, scales = getattr(p, "quant_state", None), getattr(p, "SCB", None)
        if state is not None:
            found |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        if isinstance(scales, Tensor):
            found[f"{name}.SCB"] = scales
    return found | dict(hf.named_buffers(remove_duplicate=False))


def fingerprint(hf: nn.Module, fresh: bool = False) -> str:
    """Hash the identity of a model; offloaded weights count by name and shape alone, and the hash says so.

    With `fresh`, every byte is hashed again, whether or not a change has been noticed (`core.record.hash_tensors`).
    """
    plain, other = dict[str, Tensor](), list[str]()
    for name, value in tensors(hf).items():
        if type(value) in (Tensor, nn.Parameter) and not value.is_quantized:
            plain[name] = value
        else:
            other.append(packed(name, value))
    away = any(offloaded(m) for m in hf.modules())
    return ("partial-" if away else "") + hash_text(described(hf)[0], hash_tensors(plain, fresh), *other)


def structure(hf: nn.Module) -> tuple[str, list[str]]:
    """Return `described` with the look of the weights: shapes, dtypes, devices, ties, and weights of one value only.

    Outcomes of the self-check hold for all models with the same text. A bias of zeros would hide that it is forgotten,
    so the text tells zeros from other values.
    """
    text, unread = described(hf)
    lines, first = [text], dict[int, str]()
    for name, t in tensors(hf).items():
        if not isinstance(t, Tensor):
            lines.append(f"{name}:{type(t).__qualname__}")
            continue
        tied = first.setdefault(id(t), name)
        own = type(t) in (Tensor, nn.Parameter) and not t.is_meta and not t.is_quantized
        even = _even(t) if own and tied == name else ""
        form = "" if own else _form(t)
        lines.append(f"{name}:{type(t).__qualname__}{tuple(t.shape)}{t.dtype}{t.device.type}{tied}{even}{form}")
    return "\n".join(lines), unread


def _form(t: Tensor) -> str:
    """Return how a tensor of another library is packed: block sizes, zero points, how activations are rounded."""
    if not hasattr(t, "__tensor_flatten__") or t.is_meta:
        return ""
    inner, about = t.__tensor_flatten__()  # type: ignore[operator]
    return f"{about}{[(n, getattr(t, n).dtype) for n in inner if isinstance(getattr(t, n), Tensor)]}"


def _even(t: Tensor) -> str:
    """Return the value that every number of a tensor has, if it is one."""
    flat = t.detach().reshape(-1)
    if not len(flat) or not bool((flat[:64] == flat[0]).all()) or not bool((flat == flat[0]).all()):
        return ""
    return str(flat[0].item())


def packed(name: str, value: Any) -> str:
    """Hash weights that are not a plain tensor: quantised, packed, of another library, or a dtype or shape."""
    if isinstance(value, list | tuple):
        return hash_text(*(packed(f"{name}.{i}", v) for i, v in enumerate(value)))
    if isinstance(value, Tensor):
        if value.is_quantized:
            value = torch.stack([value.dequantize().double(), value.int_repr().double()])
        elif type(value) not in (Tensor, nn.Parameter) and not value.is_meta and hasattr(value, "__tensor_flatten__"):
            inner, about = value.__tensor_flatten__()  # type: ignore[operator]
            return hash_text(str(about), *(packed(n, getattr(value, n)) for n in inner))
        return hash_tensors({name: value})
    return hash_text(repr(value))
