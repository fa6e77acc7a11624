"""Conditional edits: prompts that satisfy a condition are edited, the others keep every bit; no step forgets."""

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.dictionaries.splice import Splice, add_to_latents
from cutaway.models.edits import Add, Conditional, Project, Scale
from cutaway.models.edits.conditional import Condition
from cutaway.models.generate import generated_ids
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import batch
from tests.dictionaries.common import dictionary
from tests.models.common import model, noise

PROMPTS = [[5, 6, 7, 8, 9, 10], [21, 22, 23], [31, 32, 33, 34, 35, 36], [41, 42, 43, 44]]
SIDES = {side: batch(PROMPTS, side=side) for side in ("left", "right")}
M = model("llama_gqa")
READINGS = {None: lambda x: x[1:].mean(0), (-1,): lambda x: x[-1], (0, 2): lambda x: x[[0, 2]].mean(0)}
EDITS = {
    "steer": lambda: [Add("resid_post.1", noise(32), 3.0), Scale("mlp_out.2", 0.5)],
    "last": lambda: [Add("resid_post.1@-1", noise(32), 3.0), Project("resid_pre.2", noise(2, 32))],
    "per prompt": lambda: [Add("resid_post.1@-1", noise(4, 32), 3.0)],
}


def condition(positions=None, address="resid_post.0", width=32):
    """A condition that half of the prompts satisfy, and which they are."""
    u = noise(width, seed=3)
    x = [M.capture(batch([p]), address)[address][0] for p in PROMPTS]
    along = torch.stack([READINGS[positions](own) for own in x]) @ (u / u.norm())
    middle = float(along.sort().values[1:3].mean())
    return Condition(address, u, min=middle, positions=positions), along > middle


@pytest.mark.parametrize("positions", READINGS)
@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("side", SIDES)
def test_only_prompts_that_satisfy_it_are_edited(kind, positions, side):
    one, met = condition(positions)
    assert met.sum() == 2
    plain, every, some = (M.run_last(SIDES[side], e) for e in ((), EDITS[kind](), Conditional(EDITS[kind](), one)))
    assert torch.equal(some[~met], plain[~met])
    assert torch.equal(some[met], every[met])
    assert not torch.equal(plain[met], every[met])
    other = Condition(one.address, one.direction, max=one.min, positions=positions)
    assert torch.equal(M.run_last(SIDES[side], Conditional(EDITS[kind](), other))[met], plain[met])


def test_one_head_may_be_read():
    one, met = condition((-1,), "z.0.1", M.shape.d_head)
    edit = Add("attn_out.0", noise(32), 3.0)
    plain, every, some = (M.run_last(SIDES["right"], e) for e in ((), edit, Conditional(edit, one)))
    assert torch.equal(some, torch.where(met[:, None], every, plain))


@pytest.mark.parametrize("positions", [None, (-1,)])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_generated_tokens_follow_the_decision_on_their_prompt(positions, options):
    one, met = condition(positions)
    edits, given = EDITS["steer"](), {"eos_token_id": [999], **options}
    some = generated_ids(M, SIDES["left"], 5, [*Conditional(edits, one).parts()], given)
    for i, prompt in enumerate(PROMPTS):
        alone = generated_ids(M, batch([prompt]), 5, edits if met[i] else [], given)
        assert torch.equal(some[i], alone[0])


@pytest.mark.parametrize("positions", READINGS)
def test_sweeps_decide_as_single_runs_do(positions):
    """Whatever a sweep shares between its variants and its base."""
    alike = batch([PROMPTS[0], PROMPTS[2], PROMPTS[0][::-1], [6] * 6])
    first, second = condition(positions)[0], condition(positions, "resid_post.1")[0]
    variants = [
        [Conditional(EDITS["steer"](), first)],
        [Conditional(EDITS["last"](), second)],
        [Add("resid_pre.1@-1", noise(32), 2.0), Conditional(EDITS["per prompt"](), second)],
        [Add("resid_post.2@-1", noise(32), 2.0)],
        [],
    ]
    base = [Conditional(Add("resid_post.0", noise(32, seed=9)), first)]
    for tokens in (alike, SIDES["right"]):
        for around in ((), base):
            got = sweep(M, tokens, variants, lambda logits, prompt: logits[:, :7], base=around)
            for v, own in zip(variants, got, strict=True):
                torch.testing.assert_close(own, M.run_last(tokens, [*around, *v])[:, :7], atol=1e-5, rtol=1e-4)


def test_a_dictionary_may_be_spliced_under_a_condition():
    one, met = condition()
    d = dictionary([(40, ["mlp_in.1"], ["mlp_out.1"])], {"mlp_in.1": 32, "mlp_out.1": 32})
    splice = Splice(d, error=True, changes=(add_to_latents(3, value=9.0),))
    plain, every, some = (M.run_last(SIDES["right"], e) for e in ((), splice, Conditional(splice, one)))
    assert torch.equal(some, torch.where(met[:, None], every, plain))
    assert not torch.equal(plain[met], every[met])


def test_what_cannot_be_decided_is_refused():
    u, add = noise(32), Add("resid_post.1", noise(32))
    for make, why in (
        (lambda: Condition("resid_post.0", u), "it has no limit"),
        (lambda: Condition("resid_post.0", u, min=2.0, max=1.0), "is above max"),
        (lambda: Condition("resid_post.0@-1", u, min=0.0), "needs vectors at the positions"),
        (lambda: Conditional(add, Condition("resid_post.2", u, min=0.0)), "computes it before resid_post.2"),
        (lambda: M.run(SIDES["left"], Conditional(add, Condition("z.0", u, min=0.0))), "not .batch, position"),
        (lambda: M.run(SIDES["left"], Conditional(add, Condition("resid_post.0", u[:8], min=0.0))), "8 wide"),
        (
            lambda: M.run(SIDES["left"], Conditional(add, Condition("resid_post.0", u, min=0.0, positions=(5,)))),
            "position 5",
        ),
    ):
        with pytest.raises(Refused, match=why):
            make()
    parts = [*Conditional(add, Condition("resid_post.0", u, min=0.0)).parts()]
    with pytest.raises(Refused, match="the prompt runs in parts"):
        generated_ids(M, batch([PROMPTS[0]]), 2, parts, {"prefill_chunk_size": 3})
    with M.edited(*parts), torch.no_grad():
        ids = SIDES["left"].ids[:1, -3:]
        cache = M.hf(ids, use_cache=True).past_key_values
        with pytest.raises(Refused, match="over a key-value cache"):
            M.hf(ids[:, -1:], past_key_values=cache)
