"""Structural probing: a family row read off the modules of an architecture that has none."""

from __future__ import annotations

from typing import Any

from torch import nn

from cutaway.core.refuse import Code, Refused
from cutaway.models.anatomy.families import Family, find
from cutaway.models.anatomy.linear import is_linear

# What architectures call their parts; a name counts if it contains one of the words.
_ATTENTION = ("att",)
_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj_out")
_QUERY, _KEY, _VALUE = ("q_proj", "query", "wq"), ("k_proj", "key", "wk"), ("v_proj", "value", "wv")
_UP = ("up_proj", "fc1", "fc_in", "c_fc", "w3", "up", "h_to_4h", "dense_in")
_DOWN = ("down_proj", "fc2", "fc_out", "c_proj", "w2", "down", "4h_to_h", "dense_out")
_GATE = ("gate_proj", "w1", "gate")
_FUSED = ("qkv", "query_key", "c_attn", "gate_up", "up_gate")
_QK_NORM = ("q_norm", "q_layernorm", "query_layernorm", "query_norm")


def probe(hf: Any) -> Family:
    """Return a family row read off an unknown model's structure.

    Looks for the one list of blocks with attention, in a block for attention, MLP and norms by the words that
    architectures use, and for embeddings and final norm beside the list. Whatever is not found stays absent; whatever
    is found wrongly is caught by the self-check, which disables the site.

    Raises:
        Refused: no block list, blocks of different kinds, or no output projections.
    """
    where, blocks = _block_list(hf)
    root, _, layers = where.rpartition(".")
    top, block = find(hf, root) or hf, blocks[0]
    attn, mlp = str(_child(block, _ATTENTION)), _mlp(block)
    o = _linear(getattr(block, attn), _OUT)
    if o is None or mlp is None:
        raise _refused(hf, "no output projection was found in its attention, or no MLP beside it")
    inside: dict[str, Any] = {n: _path(attn, _linear(getattr(block, attn), words)) for n, words in _PROJECTIONS.items()}
    fused = next((c for c in _linears(getattr(block, attn)) if any(w in c.lower() for w in _FUSED)), None)
    norms = [c for c, m in block.named_children() if c not in (attn, mlp) and _is_norm(m)]
    embed = hf.get_input_embeddings()
    tables = [c for c, m in top.named_children() if isinstance(m, nn.Embedding) and m is not embed]
    return Family(
        hf.config.model_type,
        root=root,
        layers=layers,
        attn=attn,
        o=f"{attn}.{o}",
        mlp=mlp,
        probed=True,
        embed=next((p for p, m in top.named_modules() if m is embed), ""),
        pos=next((c for c in tables if "pos" in c or c == "wpe"), None),
        final=next((c for c, m in top.named_children() if _is_norm(m) and "emb" not in c.lower()), None),
        qk_norm=tuple(f"{attn}.{c}" for c, _ in getattr(block, attn).named_children() if c in _QK_NORM),
        fused=_path(attn, fused) or None,
        qkv="unknown" if fused else "separate",
        parallel=("always",) if len(norms) == 1 else (),
        **inside,
        **_mlp_parts(block, mlp),
        **_norm_parts(norms),
    )


_PROJECTIONS = {"q": _QUERY, "k": _KEY, "v": _VALUE}


def _block_list(hf: Any) -> tuple[str, nn.ModuleList]:
    n = getattr(hf.config, "num_hidden_layers", 0)
    lists = [(p, m) for p, m in hf.named_modules() if isinstance(m, nn.ModuleList) and n and len(m) == n]
    several = any(any(_child(b, _ATTENTION) for b in m) and not all(_child(b, _ATTENTION) for b in m) for _, m in lists)
    if several:
        raise _refused(hf, "only some of its blocks have attention")
    lists = [(p, m) for p, m in lists if all(_child(block, _ATTENTION) for block in m)]
    if len(lists) != 1:
        raise _refused(hf, f"{len(lists)} lists of blocks with attention were found where one is needed")
    if len({(type(block), _child(block, _ATTENTION), *_kinds(block)) for block in lists[0][1]}) > 1:
        raise _refused(hf, "its blocks are of different kinds")
    return lists[0]


def _kinds(block: nn.Module) -> list[type]:
    return [type(m) for c, m in block.named_children() if any(w in c.lower() for w in _ATTENTION)]


def _refused(hf: Any, why: str) -> Refused:
    return Refused(
        f"model type {hf.config.model_type!r}",
        f"it has no family row, and {why}",
        ("use a family of docs/families.md, or ", Code("read its modules through model.hf"), " with plain torch hooks"),
    )


def _mlp(block: nn.Module) -> str | None:
    """Find the child, other than attention and norms, that holds linear maps or experts."""
    rest = [c for c, m in block.named_children() if not _is_norm(m) and not any(w in c.lower() for w in _ATTENTION)]
    named = [c for c in rest if any(w in c.lower() for w in ("mlp", "ffn", "feed_forward", "moe"))]
    return next(iter(named), None) or _linear(block, _UP)  # OPT-like blocks hold the two maps themselves


def _mlp_parts(block: nn.Module, name: str) -> dict[str, Any]:
    mlp = getattr(block, name)
    if isinstance(mlp, nn.Linear):
        return {"up": name, "gate": None, "down": _linear(block, _DOWN) or ""}
    down, gate = _linear(mlp, _DOWN), _linear(mlp, _GATE)
    up = next((c for c in _linears(mlp) if c not in (down, gate) and any(w in c.lower() for w in _UP)), None)
    plain = down is not None and up is not None and gate != up
    if not plain or any(isinstance(m, nn.ModuleList) for m in mlp.modules()):
        return {"up": "", "gate": None, "down": ""}
    return {"up": f"{name}.{up}", "gate": _path(name, gate) or None, "down": f"{name}.{down}"}


def _norm_parts(norms: list[str]) -> dict[str, Any]:
    """Return the norms by position: two before their readers, two after their writers, four around both, or one for
    both.
    """
    after = [c for c in norms if "post" in c.lower()]
    before = [c for c in norms if c not in after]
    pairs: dict[str, str | None]
    if len(norms) == 4 and len(after) == 2:
        pairs = {"ln1": before[0], "ln1_post": after[0], "ln2": before[1], "ln2_post": after[1]}
    elif len(norms) == 2 and len(after) == 2:
        pairs = {"ln1": None, "ln1_post": after[0], "ln2": None, "ln2_post": after[1]}
    else:
        pairs = {"ln1": norms[0] if norms else None, "ln2": norms[1] if len(norms) == 2 else None}
    return pairs


def _child(block: nn.Module, words: tuple[str, ...]) -> str | None:
    names = [c for c, m in block.named_children() if any(w in c.lower() for w in words) and not _is_norm(m)]
    return next(iter(names), None)


def _linears(module: nn.Module) -> list[str]:
    return [c for c, m in module.named_children() if is_linear(m)]


def _linear(module: nn.Module, words: tuple[str, ...]) -> str | None:
    for word in words:
        for c in _linears(module):
            if word in c.lower() and not any(both in c.lower() for both in _FUSED):
                return c
    return None


def _path(parent: str, child: str | None) -> str:
    return f"{parent}.{child}" if child else ""


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())
