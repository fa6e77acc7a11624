"""What a report says of two dictionaries."""

from __future__ import annotations

import math

import pytest
import torch

from cutaway.dictionaries.evaluation import Comparison, Splitting
from cutaway.suites.dictionary_report import partners

NAN = math.nan


def test_a_comparison_is_summed_up_over_partners():
    found = Comparison(
        cosine=torch.tensor([0.9, 0.5, 0.8, NAN]),
        cosine_null=torch.tensor([[0.1], [0.8], [0.3], [NAN]]),
        overlap=torch.tensor([0.6, 0.2, NAN, NAN]),
        overlap_null=torch.tensor([[0.0], [0.6], [NAN], [NAN]]),
        partner=torch.tensor([1, 0, 2, -1]),
        record={},
    )
    each = torch.tensor([2.0, 1.0, 0.0, 3.0])
    null = torch.tensor([[0.1, 0.2], [0.1, 0.2], [NAN, NAN], [0.1, 0.2]])
    split = Splitting(
        parts=each, covered=torch.tensor([0.5, 0.1, NAN, 0.9]), covered_null=null, nearest=each / 3, nearest_null=null,
        record={},
    )  # fmt: skip
    rows = {name: (value, random) for name, value, random in partners(found, split)}
    want = {
        "mean |cosine| of partners": (2.2 / 3, [0.4]),
        "partners with |cosine| above 0.7": (2 / 3, [0.25]),
        "mean share of tokens on which partners fire together": (0.4, [0.3]),
        "partners that fire together on half of their tokens": (0.5, [0.25]),
        "narrow latents split into two or more": (0.5, []),
        "mean share of a narrow latent's tokens that its parts cover": (0.5, [0.1, 0.2]),
    }
    assert list(rows) == list(want)
    for name, (value, random) in want.items():
        assert rows[name][0] == pytest.approx(value), name
        assert rows[name][1] == pytest.approx(random), name
