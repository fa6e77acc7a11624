"""Every architecture that is found by probing, against hooks written by hand: right, disabled with a reason, refused.

The page docs/families.md says which; what it does not name as disabled is held to the truth here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.lenses.decode import read_out
from cutaway.models.access.forward import PADDING
from cutaway.models.anatomy.residual import decompose, logit_contributions
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate
from cutaway.models.generate import GENERATION, generated_ids
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens, batch
from tests.meta.tree import ROOT
from tests.models.common import gap, widely
from tests.models.every import KINDS, found, place
from tools.families import probed_line

A, B, C = [5, 17, 42, 8, 99, 23, 64], [9, 11, 150, 33, 7, 12, 13], [21, 140, 77, 6]
SAME = batch([A, B])
NEAR = 1e-4


def by_hand(hf: Any, hooks: list[tuple[Any, Callable[..., Any]]], before: bool = False) -> Tensor:
    """Logits of the transformers model itself under hooks on its modules."""
    with ExitStack() as stack, torch.no_grad():
        for module, hook in hooks:
            handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
            stack.callback(handle.remove)
        return hf(SAME.ids).logits


def zeroed(module: Any, args: Any, out: Any) -> Any:
    return torch.zeros_like(out) if isinstance(out, Tensor) else (torch.zeros_like(out[0]), *out[1:])


def check_places(kind: str, m: Model, can: set[str]) -> None:
    """Streams are what blocks take and give; ablated sites are modules whose output, or part of it, is zero."""
    hf, n = m.hf, m.shape.n_layers
    blocks, seen = hf.get_submodule(place(kind, "blocks")), {}
    assert len(blocks) == n
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            enter = lambda module, args, kw, i=i: seen.update({f"resid_pre.{i}": (*args, *kw.values())[0].clone()})  # noqa: E731
            leave = lambda module, args, out, i=i: seen.update(  # noqa: E731
                {f"resid_post.{i}": (out if isinstance(out, Tensor) else out[0]).clone()}
            )
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        plain = by_hand(hf, [])
    assert gap(m.run(SAME), plain) < NEAR
    acts = m.capture(SAME, sorted(can))
    assert gap(acts["logits"], plain) < NEAR
    assert all(gap(acts[p], seen[p]) < NEAR for p in seen if p.split(".")[0] in can)
    i = n - 2
    for site, name in (("attn_out", "attn"), ("mlp_out", "mlp")):
        if site in can:
            assert (
                gap(
                    m.run(SAME, Ablate(f"{site}.{i}")),
                    by_hand(hf, [(blocks[i].get_submodule(place(kind, name)), zeroed)]),
                )
                < NEAR
            ), site
    if {"z", "head_out"} & can:
        width = m.shape.d_head
        without = lambda module, args: (args[0].clone().index_fill_(-1, torch.arange(width, 2 * width), 0.0),)  # noqa: E731
        wanted = by_hand(hf, [(blocks[i].get_submodule(place(kind, "o")), without)], before=True)
        for site in {"z", "head_out"} & can:
            assert gap(m.run(SAME, Ablate(f"{site}.{i}.1")), wanted) < NEAR, site


def variants(m: Model, can: set[str]) -> list[list[Edit]]:
    last = m.shape.n_layers - 1
    places = ["resid_pre.1@2", f"attn_out.{last}@-1", "mlp_out.0@1", f"resid_post.{last - 1}", "resid_mid.1@2",
              "z.1.0@2", "v.1.0@1", "pattern.1.1"]  # fmt: skip
    return [[Ablate(p)] for p in places if p.split(".")[0] in can]


def check_runs(m: Model, can: set[str]) -> None:
    """Sweeps, in every padding that is not refused, are single runs of each prompt alone."""
    edits = variants(m, can)
    alone = {tuple(r): torch.stack([m.run_last(batch([r]), v)[0] for v in edits]) for r in (A, B, C)}
    batches: list[Tokens] = [SAME, *(batch([A, C], pad=3, side=s) for s in PADDING)]
    for t in batches:
        wanted = torch.stack([alone[tuple(t.row(j).ids[0].tolist())] for j in range(2)], dim=1)
        swept = sweep(m, t, edits, lambda logits, prompt: logits)
        assert all(gap(x, y) < NEAR for x, y in zip(swept, wanted, strict=True)), t.side
        if t.padded and PADDING[t.side] in m.disabled:
            with pytest.raises(Refused, match="padded on the"):
                m.run_last(t)
        else:
            assert gap(m.run_last(t, edits[0]), wanted[0]) < NEAR, t.side
    if GENERATION not in m.disabled:
        t = SAME if PADDING["left"] in m.disabled else batches[1]
        new = generated_ids(m, t, 2, edits[0], {"eos_token_id": None})
        for j in range(2):
            ids = t.row(j).ids
            for step in new[j].tolist():
                assert step == int(m.run_last(ids, edits[0]).argmax())
                ids = torch.cat([ids, torch.tensor([[step]])], dim=1)
                if step in {m.hf.generation_config.eos_token_id, 2}:
                    break


def check_readout(m: Model, can: set[str]) -> None:
    """The lens at the last layer is the model, and shares of the stream sum to its logits; or both are refused."""
    own, tokens = m.run_last(SAME), torch.tensor([7, 11])
    last = m.capture(SAME, f"resid_post.{m.shape.n_layers - 1}@-1", logits=False)[
        f"resid_post.{m.shape.n_layers - 1}@-1"
    ]
    if unembedding(m.anatomy).why:
        with pytest.raises(Refused):
            read_out(m, last)
    else:
        assert gap(read_out(m, last), own) < NEAR
    if not {"z", "mlp_out", "resid_pre", "resid_post"} <= can or "pos_embed" in m.disabled:
        with pytest.raises(Refused):
            decompose(m, SAME)
        return
    parts = decompose(m, SAME)
    assert gap(parts.contribution.sum(1), parts.total) < NEAR
    if not unembedding(m.anatomy).linear:
        with pytest.raises(Refused, match="not linear"):
            logit_contributions(m, parts, tokens)
        return
    shares, rest = logit_contributions(m, parts, tokens)
    uncapped = read_out(m, last, capped=False)[torch.arange(2), tokens]
    assert gap(shares.sum(1) + rest, uncapped) < NEAR


@pytest.mark.parametrize("kind", widely(KINDS, core=KINDS[::8]))
def test_right_disabled_or_refused(kind):
    assert probed_line(kind) in (ROOT / "docs" / "families.md").read_text("utf-8"), "run `make docs`"
    m = found(kind).model
    if m is None:
        assert found(kind).why.startswith(("refused: ", "not tried: "))
        return
    can = {s for s, text in m.sites().items() if text.startswith("read")}
    check_places(kind, m, can)
    check_runs(m, can)
    check_readout(m, can)


def test_the_page_has_one_line_for_each():
    lines = (ROOT / "docs" / "families.md").read_text("utf-8").partition("## Found by probing")[2].splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == KINDS
