"""Generation under edits: the key-value cache, padding and beams change nothing about what an edit means."""

import copy

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Ablate, Add, Freeze, Knockout, Project, Replace, Scale
from cutaway.models.generate import generated_ids
from cutaway.models.model import Model
from cutaway.models.tokens import batch
from tests.models.common import CAUSAL, LONG, SHORT, model, noise, widely

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


@pytest.mark.parametrize("name", widely(CAUSAL))
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


@pytest.mark.parametrize("name", ["llama_gqa", "mistral_window", "gptj"])
def test_every_cache_gives_the_same_tokens(name):
    m = model(name)
    formed = [Scale("scores.1", 1.0), Scale("pattern.0.2", 2.0), *(Ablate(f"v.{i}@2") for i in range(m.shape.n_layers))]
    edits = [*formed, *AT["keys"](m), *AT["edges"](m), Freeze("z.2", m.capture(T, "z.2"))]
    for some in (edits, [Scale("scores.1", 1.0)]):
        dynamic = ids(m, T, some)
        for options in ({"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
            assert torch.equal(ids(m, T, some, **options), dynamic)
    edits.pop()
    one = ids(m, ONE, edits)  # unpadded prompts come without a mask
    assert torch.equal(ids(m, ONE, edits, cache_implementation="static"), one)
    assert torch.equal(ids(m, ONE, edits, prompt_lookup_num_tokens=2), one)
    assert torch.equal(ids(m, ONE, [Scale("scores.1", 1.0)], cache_implementation="static"), ids(m, ONE, []))


def test_what_the_checkpoint_asks_for_is_left_out_unless_the_caller_asks():
    hf = copy.deepcopy(model("llama_gqa").hf)
    plain = ids(m := Model(hf), T, [])
    own = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 1, "suppress_tokens": plain[0].tolist(),
           "do_sample": True, "temperature": 5.0, "min_length": 30, "max_length": 3}  # fmt: skip
    for name, value in own.items():
        setattr(hf.generation_config, name, value)
    before = hf.generation_config.to_dict()
    assert torch.equal(ids(m, T, []), plain)
    assert not torch.equal(ids(m, T, [], suppress_tokens=plain[0].tolist()), plain)
    assert hf.generation_config.to_dict() == before
    hf.generation_config.eos_token_id = int(plain[0, 1])  # where the text ends, it still ends
    assert generated_ids(m, ONE, NEW, [], {}).tolist() == [plain[0, :2].tolist()]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"return_dict_in_generate": True}, "returns texts"),
        ({"attention_mask": torch.ones(1, 7)}, "know their padding"),
        ({"max_length": 30}, "say max_new_tokens="),
        ({"tokens": 60}, "say max_new_tokens="),
        ({"num_beam": 2}, "near: num_beams"),
        ({"num_return_sequences": 2}, "transformers cannot: Greedy"),
        ({"cache_implementation": "nonsense"}, "transformers cannot: Invalid"),
        ({"cache_implementation": "offloaded"}, "model is on the CPU"),
        ({"guidance_scale": 2.0}, "second run has no prompt"),
    ],
)
def test_options_work_or_are_refused_in_words(options, word):
    with pytest.raises(Refused, match=word):
        model("llama").generate(ONE.ids, 2, Scale("z.1", 1.0), **options)


def test_options_that_are_objects_work():
    class Heard:
        ended = False

        def put(self, value):
            self.last = value

        def end(self):
            self.ended = True

    heard, m = Heard(), model("llama")
    text = m.generate(ONE.ids, max_new_tokens=2, streamer=heard, eos_token_id=None)
    assert len(text[0].split()) == 2
    assert heard.ended
    assert text[0].endswith(str(int(heard.last)))


def test_positions_are_refused_in_own_forwards_over_a_cache():
    m = model("llama")
    with m.edited(Ablate("z.1@2")), pytest.raises(Refused, match="over a key-value cache"):
        m.hf.generate(ONE.ids, attention_mask=ONE.mask.long(), max_new_tokens=2, do_sample=False, pad_token_id=0)
    steer = [Add("resid_post.1", noise(32), 3.0)]
    with m.edited(*steer):
        own = m.hf.generate(
            ONE.ids, attention_mask=ONE.mask.long(), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    assert torch.equal(own[:, 7:], generated_ids(m, ONE, NEW, steer, {}))


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
