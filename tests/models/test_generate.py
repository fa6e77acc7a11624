"""Generation under edits: the key-value cache, padding and beams change nothing about what an edit means."""

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.edits import Ablate, Add, Freeze, Knockout, Project, Replace, Scale
from cutaway.models.generate import generated_ids
from cutaway.models.model import Model
from cutaway.models.tokens import batch
from tests.models.common import CAUSAL, LONG, SHORT, model, noise

NEW = 4
T = batch([LONG, SHORT], side="left")
ONE = batch([LONG])

EVERYWHERE = {
    "steer": lambda m: [Add("resid_post.1", noise(32), 3.0)],
    "heads": lambda m: [Ablate("z.1.0"), Ablate("pattern.0.1"), Scale("head_out.2.3", -2.0)],
    "keys": lambda m: [Scale("k.1", -1.5), Scale("v.0", 2.0), Scale("q.2", 1.5)],
    "erase": lambda m: [Project("resid_pre.2", noise(3, 32)), Scale("mlp_out.0", 3.0)],
}
AT = {
    "steer": lambda m: [Add("resid_post.1@1", noise(32), 5.0), Add("resid_pre.1@-1", noise(32, seed=2), 5.0)],
    "keys": lambda m: [Scale("k.1@1", -3.0), Replace("v.1@0", 3 * noise(m.shape.n_kv_heads, m.shape.d_head))],
    "edges": lambda m: [Knockout(f"pattern.{i}", queries=(-1, 2), keys=(0, 1)) for i in range(m.shape.n_layers)],
}
EDITS = {f"all-{n}": e for n, e in EVERYWHERE.items()} | {f"at-{n}": e for n, e in AT.items()}


def ids(m, t, edits, **options):
    return generated_ids(m, t, NEW, edits, {"eos_token_id": [999], **options})


@pytest.mark.parametrize("name", CAUSAL)
def test_cached_equals_uncached_and_padded_equals_single(name):
    m = model(name)
    for group in (EVERYWHERE, AT):
        edits = [e for make in group.values() for e in make(m)]
        cached = ids(m, T, edits)
        assert torch.equal(cached, ids(m, T, edits, use_cache=False))
        assert torch.equal(ids(m, batch([SHORT]), edits)[0], cached[1])


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "bloom", "qwen3", "mistral_window"])
@pytest.mark.parametrize("kind", EDITS)
def test_each_new_token_is_the_best_of_one_edited_forward(name, kind):
    m = model(name)
    edits = EDITS[kind](m)
    new = ids(m, ONE, edits)[0].tolist()
    assert torch.equal(ids(m, ONE, edits, use_cache=False)[0], torch.tensor(new))
    if name in ("llama_gqa", "qwen3"):  # random models with tied embeddings repeat themselves, whatever is done
        assert new != ids(m, ONE, [])[0].tolist()
    if kind in ("at-edges", "at-steer"):
        return  # they count from the prompt's end, which the one long prompt below has elsewhere
    logits = m.run(batch([[*LONG, *new]]), edits)[0]
    assert logits[len(LONG) - 1 : -1].argmax(-1).tolist() == new


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "mistral_window", "falcon_7b"])
def test_frozen_prompts_stay_frozen_and_new_tokens_go_free(name):
    m = model(name)
    source = m.capture(batch([LONG[::-1], [41, 42, 43]]), ["z.1", "v.1", "k.0", "pattern.2", "resid_pre.1"])
    for edits in ([Freeze(p, source) for p in ("z.1", "v.1", "k.0")], [Freeze("resid_pre.1@1", source)]):
        cached = ids(m, T, edits)
        assert torch.equal(cached, ids(m, T, edits, use_cache=False))
    pattern = [Freeze("pattern.2", m.capture(batch([LONG[::-1]]), "pattern.2"))]
    assert torch.equal(ids(m, ONE, pattern), ids(m, ONE, pattern, use_cache=False))


def test_beams_and_samples_run_in_the_frame_of_their_prompt():
    m, edits = model("llama"), [Add("resid_pre.1@1", noise(32), 5.0)]
    with m.edited():
        beams = ids(m, T, edits, num_beams=3)
    for row, prompt in enumerate((LONG, SHORT)):
        assert torch.equal(ids(m, batch([prompt]), edits, num_beams=3)[0], beams[row])
    assert ids(m, T, edits, do_sample=True, num_return_sequences=2).shape == (4, NEW)


def test_without_edits_it_is_transformers_own():
    m = model("gpt2")
    own = m.hf.generate(ONE.ids, attention_mask=ONE.mask.long(), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert m.generate(ONE.ids, NEW) == [" ".join(map(str, own[0, 7:].tolist()))]


def test_impossible_generations_are_refused():
    m = model("llama")
    for new in (0, 60):
        with pytest.raises(Refused, match="room for 1 to 57"):
            m.generate(ONE.ids, new)
    with pytest.raises(Refused, match="encoder"):
        model("bert").generate(ONE.ids, 2)
    with pytest.raises(Refused, match="outside the prompt"):
        m.generate(ONE.ids, 2, Scale("z.1@9", 2.0))


def test_an_edit_beyond_the_prompt_is_not_silently_dropped_in_later_steps():
    m: Model = model("llama")
    with pytest.raises(Refused, match="shortest prompt"):
        generated_ids(m, T, 3, [Scale("z.1@4", 2.0)], {})
