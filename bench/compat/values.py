"""Values of notebooks as flat tables of leaves, kept in JSON and safetensors, and what two of them differ in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

CLOSE = 1e-4  # in the unit of a value, or of the largest value of a tensor where that is above 1
KEPT, LONGEST, DEEPEST = 8192, 2000, 6  # entries of a tensor, leaves of a value, levels of nesting
# dill takes modules of a folder with another name by value, and cannot do so with pyarrow.
EXTRA = 'folder, called "site-packages",'
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE)
_MARKUP = re.compile(r"<(div|svg|script)\b")
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")

Leaf = Any  # a tensor, or what JSON holds


def leaves(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Leaf]]:
    """Yield the paths and leaves of a value: tensors, arrays, numbers and texts, in containers of any kind."""
    import torch

    inner = opened(value)
    if isinstance(value, torch.Tensor):
        yield path, value.detach()
    elif isinstance(value, str) and _MARKUP.search(value):
        yield path, "a drawing"  # names in it are random there, so that two runs there differ
    elif value is None or isinstance(value, bool | int | float | str):
        yield path, value
    elif isinstance(inner, Mapping) and depth < DEEPEST:
        for key in list(inner)[:LONGEST]:
            yield from leaves(inner[key], f"{path}[{key!r}]", depth + 1)
    elif isinstance(inner, list | tuple) and depth < DEEPEST:
        yield f"{path}.len", len(inner)
        for i, one in enumerate(inner[:LONGEST]):
            yield from leaves(one, f"{path}[{i}]", depth + 1)
    elif inner is not value and depth < DEEPEST:
        yield from leaves(inner, path, depth + 1)


def opened(value: Any) -> Any:
    """Return the plain form of an array, set, cache, factored matrix or table; other values as they are."""
    import torch

    match type(value).__name__:
        case "ndarray" if value.dtype.kind in "biufc":
            return torch.from_numpy(value.copy())
        case "ndarray" | "Series" | "Index":
            return value.tolist()
        case "DataFrame":
            return {str(name): value[name].tolist() for name in value.columns}
        case "ActivationCache":
            return dict(value.items())
        case "FactoredMatrix":
            return {"A": value.A, "B": value.B}
        case "set" | "frozenset":
            return sorted(value, key=str)
        case "Size":
            return list(value)
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value


def signature(value: Any, depth: int = 0) -> Any:
    """Return what changes when a value does: by content for scalars and containers, by identity and version else."""
    import torch

    if isinstance(value, torch.Tensor):
        return id(value), 0 if value.is_inference() else value._version, tuple(value.shape)
    if value is None or isinstance(value, bool | int | float | str):
        return value if value == value else "nan"
    if type(value).__name__ == "ndarray":
        return id(value), hash(value.tobytes()) if value.dtype.kind in "biufc" else len(value)
    if isinstance(value, Mapping | list | tuple) and depth < 3:
        parts = value.values() if isinstance(value, Mapping) else value
        return id(value), len(value), tuple(signature(one, depth + 1) for one in list(parts)[:200])
    return id(value)


def packed(found: Mapping[str, Leaf]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return leaves as JSON, and the tensors among them, evenly thinned to `KEPT` entries, by path."""
    import torch

    table, tensors = dict[str, Any](), dict[str, torch.Tensor]()
    for path, leaf in found.items():
        if not isinstance(leaf, torch.Tensor):
            table[path] = leaf if not isinstance(leaf, float) or leaf == leaf else "nan"
            continue
        whole = leaf.to_dense() if leaf.is_sparse else leaf
        flat = (torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole).cpu().reshape(-1)
        flat = flat.float() if flat.is_floating_point() else flat.long()
        kept = torch.linspace(0, len(flat) - 1, KEPT, dtype=torch.float64).long() if len(flat) > KEPT else slice(None)
        tensors[path] = flat[kept].clone()
        kind = "float" if leaf.is_floating_point() else "complex" if leaf.is_complex() else "whole"
        table[path] = {"shape": list(leaf.shape), "kind": kind}
    return table, tensors


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences of two tables of leaves, whose tensors are in place."""
    for path, there in theirs.items():
        if path not in ours:
            yield f"{path}: not here; there {said(there)}"
        elif not agree(here := ours[path], there):
            yield f"{path}: here {said(here, there)}; there {said(there)}"


def agree(here: Any, there: Any) -> bool:
    """Return True if two leaves are the same: tensors and numbers to `CLOSE`, texts word by word."""
    if isinstance(here, dict) and isinstance(there, dict):
        same = here["shape"] == there["shape"] and here["kind"] == there["kind"]
        return same and close(here["values"].double(), there["values"].double())
    if isinstance(here, str) and isinstance(there, str):
        return same_text(here, there)
    if any(isinstance(one, bool | str | dict) or one is None for one in (here, there)):
        return here == there
    return here == there or abs(here - there) <= CLOSE * max(abs(there), 1.0)


def close(here: Any, there: Any) -> bool:
    """Return True if tensors are equal to `CLOSE` of the largest value, what is not finite being the same."""
    finite = there.isfinite()
    if not bool((here.isfinite() == finite).all()):
        return False
    if not bool((here.nan_to_num() == there.nan_to_num())[~finite].all()):
        return False
    if not finite.any():
        return True
    return float((here - there)[finite].abs().max()) <= CLOSE * max(float(there[finite].abs().max()), 1.0)


def same_text(here: str, there: str) -> bool:
    """Return True if two texts have the same words, and numbers that agree to a unit of their last place."""
    here, there = (_ADDRESS.sub("0x", text) for text in (here, there))
    if here == there:
        return True
    pairs = list(zip(_NUMBER.findall(here), _NUMBER.findall(there), strict=False))
    units = (10.0 ** -len(b.partition(".")[2].lower().partition("e")[0]) if "." in b else 0.0 for _, b in pairs)
    near = (abs(float(a) - float(b)) <= CLOSE * abs(float(b)) + u for (a, b), u in zip(pairs, units, strict=True))
    return _NUMBER.split(here) == _NUMBER.split(there) and all(near)


def said(leaf: Any, beside: Any = None) -> str:
    """Return a leaf in a few words; of a tensor, the entry that is furthest from that of another."""
    if not isinstance(leaf, dict):
        return _cut(leaf, beside) if isinstance(leaf, str) else repr(leaf)[:120]
    values, at = leaf["values"], 0
    if isinstance(beside, dict) and beside["values"].shape == values.shape and len(values):
        gap = (values.double() - beside["values"].double()).nan_to_num(nan=float("inf")).abs()
        at = int(gap.argmax())
        return f"{leaf['kind']}{leaf['shape']}, {values[at]:.6g} for {beside['values'][at]:.6g}"
    return f"{leaf['kind']}{leaf['shape']}" + (f" from {values[0]:.6g}" if len(values) else "")


def _cut(text: str, beside: Any) -> str:
    """Return the part of a text from shortly before its first difference to another."""
    other = beside if isinstance(beside, str) else ""
    first = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    return repr(text[max(0, first - 20) : first + 100])
