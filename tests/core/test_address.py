"""Addresses have one string form that round-trips, and refuse what means nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutaway.core.address import Address, example, expand, parse, unit_axis
from cutaway.core.refuse import Refused
from cutaway.core.sites import BY_NAME, SITES

SIZES = {"layer": 3, "head": 4, "kv_head": 2, "neuron": 8, "expert": 5}


@st.composite
def addresses(draw):
    row = draw(st.sampled_from(SITES))
    layer = draw(st.integers(0, 99)) if row.scope == "layer" else None
    unit = draw(st.none() | st.integers(0, 99)) if unit_axis(row) else None
    position = draw(st.none() | st.integers(-9, 99)) if row.has_position else None
    return Address(row.name, layer, unit, position)


@given(addresses())
def test_string_form_round_trips(address):
    assert parse(str(address)) == address
    assert parse(address) is address


@given(addresses())
def test_place_and_at_keep_the_rest(address):
    assert address.place == Address(address.site, address.layer)
    if address.row.has_position:
        assert address.at(5) == Address(address.site, address.layer, address.unit, 5)
        assert parse(str(address.at(-1))).position == -1


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_.*@-0123456789", max_size=24))
def test_any_text_is_an_address_or_a_refusal(text):
    try:
        assert str(parse(text)).split("@")[0].split(".")[0] == text.split("@")[0].split(".")[0]
    except Refused as refused:
        assert all(refused.args)  # noqa: PT017  (either outcome is right; a half-empty refusal is not)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("resid_pst.3", "resid_post"),
        ("resid_post", "indices"),
        ("resid_post.1.2", "indices"),
        ("embed.0", "indices"),
        ("resid_post.x", "whole number"),
        ("resid_post.1@x", "whole number"),
        ("pattern.1@2", "no position axis"),
        ("z.*.1", "pattern"),
        ("ln1.scale.0.1", "indices"),
    ],
)
def test_refusals_say_what_is_wrong(text, word):
    with pytest.raises(Refused, match=word):
        parse(text)


def test_dotted_site_names_parse():
    assert parse("ln1.scale.2@-1") == Address("ln1.scale", 2, None, -1)
    assert parse("final.scale") == Address("final.scale")


def test_expand_fills_layers_and_units():
    assert [str(a) for a in expand("resid_post", SIZES)] == ["resid_post.0", "resid_post.1", "resid_post.2"]
    assert [str(a) for a in expand("z.1.*", SIZES)] == ["z.1.0", "z.1.1", "z.1.2", "z.1.3"]
    assert len(expand("v.*.*", SIZES)) == 6
    assert [str(a) for a in expand("resid_pre.*@-1", SIZES)] == [f"resid_pre.{i}@-1" for i in range(3)]
    assert [str(a) for a in expand(["embed", Address("z", 0), "embed"], SIZES)] == ["embed", "z.0"]


@pytest.mark.parametrize("text", ["resid_post.3", "z.0.4", "v.0.2", "z.-1.0", "nowhere", "embed.*", "pattern.*@1"])
def test_expand_refuses_what_lies_outside_the_model(text):
    with pytest.raises(Refused):
        expand(text, SIZES)


def test_every_site_has_an_example_that_parses():
    for row in SITES:
        assert parse(example(row)).row is BY_NAME[row.name]
