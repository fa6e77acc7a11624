"""Nodes and edges have one string form that round-trips, and refuse what means nothing."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutaway.core.address import Address, expand, parse
from cutaway.core.node import (
    Bias,
    Direction,
    Edge,
    Error,
    Latent,
    Logit,
    Others,
    layer_of,
    parse_edge,
    parse_node,
)
from cutaway.core.refuse import Refused
from tests.core.test_address import SIZES, addresses

COUNTS, PLACES = st.integers(0, 10**6), st.none() | st.integers(-9, 99)
MODELS = st.sampled_from(["", "base", "pythia-70m", "step.1000", "a/b"])


@st.composite
def nodes(draw):
    model, position = draw(MODELS), draw(PLACES)
    match draw(st.sampled_from("aelobdg")):
        case "a":
            a = draw(addresses())
            return Address(a.site, a.layer, a.unit, a.position, model)
        case "l":
            return Latent(draw(COUNTS), draw(COUNTS), position, model)
        case "e":
            return Error(draw(COUNTS), position, model)
        case "o":
            return Others(draw(COUNTS), position, model)
        case "b":
            return Bias("attn_out", draw(COUNTS), model) if draw(st.booleans()) else Bias(model=model)
        case "d":
            return Direction(draw(st.sampled_from(["truth", "a-probe", "v_2"])), position, model)
        case _:
            return Logit(draw(COUNTS), position, model, draw(st.none() | COUNTS))


@given(nodes())
def test_nodes_round_trip(node):
    assert parse_node(str(node)) == node
    assert parse_node(node) is node
    assert pickle.loads(pickle.dumps(node)) == node


@given(nodes(), nodes(), st.booleans())
def test_edges_round_trip(source, target, ascii_):
    edge = Edge(source, target)
    text = str(edge).replace("→", "->") if ascii_ else str(edge)
    assert parse_edge(text) == edge == parse_edge([str(source), target]) == parse_edge(edge)


@given(st.text(alphabet="latenterrorlogitz.@:->→*0123456789 ", max_size=24))
def test_any_text_is_a_node_or_a_refusal(text):
    try:
        assert parse_node(str(parse_node(text))) == parse_node(text)
    except Refused as refused:
        assert all(refused.args)  # noqa: PT017  (either outcome is right; a half-empty refusal is not)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("latent.3", "latent.BLOCK.INDEX"), ("error.1.2", "error.BLOCK"), ("logit.x", "whole number"),
        ("latent.-1.2", "negative"), ("laten.3.1", "latent|site"), (":z.1", "model's name"),
        ("bias.attn_out", "attn_out.LAYER"), ("bias.z.1.2", "one layer's site"), ("bias.attn_out.3@1", "no position"),
        ("direction.a.b", "one name"), ("direction.", "one name"), ("logit.3.4", "logit.TOKEN"), ("logit.3-x", "whole"),
        ("others.1.2", "others.BLOCK"), ("a:b:z.1", "model's name"), ("logit.1@x", "whole number"),
    ],
)  # fmt: skip
def test_refusals_say_what_is_wrong(text, word):
    with pytest.raises(Refused, match=word):
        parse_node(text)


@pytest.mark.parametrize("text", ["z.9.6", "z.9.6→", "z.9.6→z.10.0→logits", "→"])
def test_an_edge_has_two_ends(text):
    with pytest.raises(Refused):
        parse_edge(text)


def test_a_model_is_a_field_and_one_model_takes_none():
    a = parse("base:z.3.1@-1")
    assert (a.model, a.site, a.place, str(a.at(2))) == ("base", "z", Address("z", 3, model="base"), "base:z.3.1@2")
    assert a != parse("z.3.1@-1")
    with pytest.raises(Refused, match="names the model 'base'"):
        expand("base:z.1.1", SIZES)


def test_layers_of_nodes():
    assert [layer_of(parse_node(n)) for n in ("z.9.6", "latent.3.1@5", "error.4", "logit.2", "embed")] == [
        9, 3, 4, None, None,
    ]  # fmt: skip
