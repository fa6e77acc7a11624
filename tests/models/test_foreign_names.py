"""Foreign names: the vocabulary of TransformerLens goes to addresses and back."""

import pytest

from cutaway.core.address import Address, parse
from cutaway.core.refuse import Refused
from cutaway.core.sites import SITES
from cutaway.models.anatomy.foreign_names import from_transformer_lens, to_transformer_lens
from cutaway.models.edits.library import Scale
from tests.models.common import IDS, model

NAMES = {
    "hook_embed": "embed",
    "hook_pos_embed": "pos_embed",
    "ln_final.hook_scale": "final.scale",
    "blocks.0.hook_resid_pre": "resid_pre.0",
    "blocks.11.hook_resid_mid": "resid_mid.11",
    "blocks.3.hook_resid_post": "resid_post.3",
    "blocks.3.hook_attn_out": "attn_out.3",
    "blocks.3.hook_mlp_out": "mlp_out.3",
    "blocks.5.attn.hook_z": "z.5",
    "blocks.5.attn.hook_v": "v.5",
    "blocks.5.attn.hook_pattern": "pattern.5",
    "blocks.5.attn.hook_attn_scores": "scores.5",
    "blocks.5.attn.hook_result": "head_out.5",
    "blocks.7.ln1.hook_scale": "ln1.scale.7",
    "blocks.7.ln2.hook_scale": "ln2.scale.7",
    "blocks.7.mlp.hook_post": "mlp_post.7",
}
NAMELESS = {"router", "logits", "q_in", "k_in", "v_in"}  # hook_q_input lies before the norm, q_in behind it


@pytest.mark.parametrize(("foreign", "own"), NAMES.items())
def test_both_directions(foreign, own):
    assert from_transformer_lens(foreign) == parse(own)
    assert to_transformer_lens(parse(own)) == foreign


@pytest.mark.parametrize("gated", [True, False])
def test_every_site_that_has_a_name_comes_back(gated):
    for row in SITES:
        address = Address(row.name, 4 if row.scope == "layer" else None)
        if row.name in NAMELESS or row.name.startswith("ssm.") or (row.name == "mlp_gate" and not gated):
            with pytest.raises(Refused):
                to_transformer_lens(address, gated)
        else:
            assert from_transformer_lens(to_transformer_lens(address, gated), gated) == address


def test_gated_mlps_call_their_activations_argument_pre():
    assert from_transformer_lens("blocks.2.mlp.hook_pre", gated=True) == parse("mlp_gate.2")
    assert from_transformer_lens("blocks.2.mlp.hook_pre_linear", gated=True) == parse("mlp_pre.2")
    assert from_transformer_lens("blocks.2.mlp.hook_pre") == parse("mlp_pre.2")


def test_rotated_queries_and_plain_ones_are_one_site():
    assert from_transformer_lens("blocks.2.attn.hook_rot_q") == from_transformer_lens("blocks.2.attn.hook_q")


@pytest.mark.parametrize(
    "wrong", ["blocks.2.hook_nothing", "blocks.x.hook_resid_pre", "resid_pre.2", "", "blocks.2.mlp.hook_pre_linear"]
)
def test_other_names_are_refused(wrong):
    with pytest.raises(Refused, match="no counterpart"):
        from_transformer_lens(wrong)


def test_the_name_of_another_tool_is_answered_with_the_site_meant():
    m, gated = model("gpt2"), model("llama")
    for name, site in (
        ("blocks.1.attn.hook_z", "z.1"),
        ("blocks.*.hook_resid_post@-1", r"resid_post.\*@-1"),
        ("hook_resid_post", "resid_post"),
        ("hook_z", "z"),
        ("hook_embed", "embed"),
        ("blocks.0.mlp.hook_pre", "mlp_pre.0"),
    ):
        with pytest.raises(Refused, match=f"TransformerLens calls it so; here it is {site}\n"):
            m.capture(IDS, name)
    with pytest.raises(Refused, match=r"mlp_gate\.0"):
        gated.capture(IDS, "blocks.0.mlp.hook_pre")
    with pytest.raises(Refused, match=r"here it is resid_pre\.0@2"):
        m.run(IDS, Scale("blocks.0.hook_resid_pre@2", 1.0))
    with pytest.raises(Refused, match="no site has that name"):
        m.capture(IDS, "blocks.0.hook_nothing")
