"""Models of either engine, and TransformerLens 3.9's values for them (`bench.compat.helpers`)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compat import helpers, hook_points
from cutaway.compat.transformer_lens import HookedTransformer, HookedTransformerConfig

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "helpers.json").read_text("utf-8"))


@cache
def model(name: str) -> Any:
    """A native model of a configuration's name, or the bridged and processed one of a Hugging Face model's."""
    if name in helpers.NATIVE:
        return HookedTransformer(HookedTransformerConfig.from_dict(hook_points.native(name)))
    return HookedTransformer.from_pretrained(name, hf_model=hook_points.subject(name))


def same(found: dict[str, torch.Tensor], wanted: dict[str, Any]) -> None:
    """Hold the digests of tensors against TransformerLens', to 1e-4."""
    assert list(found) == list(wanted)
    for name, (shape, most, projections) in hook_points.digest(found).items():
        assert shape == wanted[name][0], name
        assert most == pytest.approx(wanted[name][1], rel=1e-4, abs=1e-4), name
        assert projections == pytest.approx(wanted[name][2], rel=1e-4, abs=1e-4 * max(1.0, most)), name
