"""Every hook point, its gradient, the weights and the logits, against TransformerLens 3.9's values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compat import hook_points
from cutaway.compat.transformer_lens import HookedTransformer, HookedTransformerConfig

REFERENCE = json.loads((Path(__file__).parent / "reference" / "hook_points.json").read_text("utf-8"))


def compare(found: dict[str, torch.Tensor], wanted: dict[str, Any]) -> None:
    assert set(found) == set(wanted)
    for name, (shape, most, projections) in hook_points.digest(found).items():
        assert shape == wanted[name][0], name
        assert most == pytest.approx(wanted[name][1], rel=1e-4, abs=1e-4), name
        assert projections == pytest.approx(wanted[name][2], rel=1e-4, abs=1e-4 * max(1.0, most)), name


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("name", hook_points.SUBJECTS)
def test_bridged_models_equal_transformer_lens(name: str, processed: bool) -> None:
    hf = hook_points.subject(name)
    before = {n: p.clone() for n, p in hf.state_dict().items()}
    make = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
    compare(hook_points.captured(make(name, hf_model=hf)), REFERENCE[f"{name} {'processed' if processed else 'raw'}"])
    assert all(torch.equal(p, before[n]) for n, p in hf.state_dict().items()), "the user's model was changed"


@pytest.mark.parametrize("name", hook_points.NATIVE)
def test_native_models_equal_transformer_lens_from_the_seed_on(name: str) -> None:
    model = HookedTransformer(HookedTransformerConfig.from_dict(hook_points.native(name)))
    compare(hook_points.captured(model), REFERENCE[f"native {name}"])
