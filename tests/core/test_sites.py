"""The site table is complete in itself: unique names, known axes, a note a row."""

import pytest

from cutaway.core.refuse import Refused
from cutaway.core.sites import SITES, site

AXES = {"batch", "position", "q_pos", "k_pos", "head", "kv_head", "d_model", "d_head", "neuron", "expert", "token",
        "channel", "state", "ssm_head", "group"}  # fmt: skip


def test_imports_are_unique_and_in_house_axes():
    assert len({s.name for s in SITES}) == len(SITES)
    for row in SITES:
        assert set(row.axes.split()) <= AXES, row.name
        assert row.axes.startswith("batch ")
        assert row.note
        assert row.name.replace("_", "").replace(".", "").isalnum()


def test_derived_properties():
    assert site("z").head_axis == "head"
    assert site("v").head_axis == "kv_head"
    assert site("resid_post").head_axis is None
    assert site("resid_post").has_position
    assert not site("pattern").has_position


def test_unknown_site_names_the_nearest():
    with pytest.raises(Refused, match="resid_post"):
        site("residpost")
