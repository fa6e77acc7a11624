"""The tuned lens: the logit lens where it translates nothing, nearer to the model after training, and its files."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.core.subject import subject
from cutaway.lenses.decode import divergence, read_out
from cutaway.lenses.tuned import TunedLens
from cutaway.lenses.tuned_training import TunedLensUpdate
from cutaway.tasks.prompts import Prompts, as_prompts
from cutaway.zoo.miniworld.documents import WorldDocuments
from tests.conformance import subjects

LIKE_LOGIT = ("probability", "interval", "null", "rank", "divergence", "foil_probability")


def example(seed: int = 0) -> tuple[Any, TunedLens]:
    """A model that nobody trained, with translators drawn at random."""
    model = subjects.random_llama(seed)
    return model, subject("lens").example({"model": model})


@cache
def trained() -> TunedLens:
    """A short training on the miniworld's own text."""
    return ca.lenses.train_tuned_lens(subjects.miniworld(), tokens=12_000, batch=256)


@cache
def held_out(n: int = 12) -> Prompts:
    """Text of the miniworld that no training reads."""
    model = subjects.miniworld()
    texts = WorldDocuments(model.world, seed=1_000_003).read(0)
    return as_prompts([t for t in islice(texts, 3 * n) if len(model.tokenizer(t)["input_ids"]) < 90][:n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_identity_translators_are_the_logit_lens_bit_for_bit(name, dtype):
    model, task = subjects.family(name, dtype), subjects.numbered_task(uneven=True)
    logit = ca.lenses.logit_lens(model, task, samples=2)
    tuned = ca.lenses.tuned_lens(model, task, ca.lenses.identity_lens(model), samples=2)
    for field in LIKE_LOGIT:
        assert torch.equal(getattr(tuned, field), getattr(logit, field)), field
    assert torch.equal(tuned.logit_probability, logit.probability)
    assert torch.equal(tuned.logit_divergence, logit.divergence)


def test_a_translator_is_an_affine_map_before_the_final_norm():
    model, lens = example()
    tokens = subjects.llama_task(1).bind(model).clean
    with torch.no_grad():
        hidden = model.hf(tokens.ids, output_hidden_states=True).hidden_states
        own = model.hf(tokens.ids).logits[0, -1]
        x = hidden[1][0, -1]
        logits = model.hf.lm_head(model.hf.model.norm(x + lens.weight[1] @ x + lens.bias[1]))
    kl = (own.softmax(-1) * (own.log_softmax(-1) - logits.log_softmax(-1))).sum()
    got = ca.lenses.tuned_lens(model, subjects.llama_task(1), lens, samples=1)
    torch.testing.assert_close(got.divergence[1], kl, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got.divergence[:-1], got.logit_divergence[:-1])
    assert abs(float(got.divergence[-1])) < 1e-6


def test_divergences_of_each_position_are_means_over_all_but_the_first_and_special():
    model, lens = example()
    prompt = subjects.llama_task(1)
    ids = prompt.bind(model).clean.ids
    with torch.no_grad():
        out = model.hf(ids, output_hidden_states=True)
        x = lens.at(1, out.hidden_states[1][0, 1:])
        kl = divergence(out.logits[0, 1:], read_out(model, x)).mean()
    got = ca.lenses.tuned_lens(model, prompt, lens, each_position=True, samples=1)
    torch.testing.assert_close(got.divergence[1], kl, rtol=1e-4, atol=1e-5)
    assert got.record["positions of divergences"] == "all but the first and special tokens"


def test_gradients_are_those_of_the_mean_divergence_and_the_model_gets_none(monkeypatch):
    model = subjects.random_llama()
    update = TunedLensUpdate(model)
    g = torch.Generator().manual_seed(0)
    acts = [torch.randn(7, model.shape.d_model, generator=g) for _ in update.places]
    with torch.no_grad():
        update.weight += 0.1 * torch.randn(update.weight.shape, generator=g)
    monkeypatch.setattr("cutaway.lenses.tuned_training.CHUNK", 3 * model.shape.d_vocab)  # chunks of three tokens
    losses, grads = update.gradients(acts), update.weight.grad
    assert grads is not None
    weight = update.weight.detach().clone().requires_grad_()
    own = model.hf.lm_head(model.hf.model.norm(acts[-1])).log_softmax(-1)
    for d, x in enumerate(acts[:-1]):
        q = model.hf.lm_head(model.hf.model.norm(x + x @ weight[d].T)).log_softmax(-1)
        kl = (own.exp() * (own - q)).sum(-1).mean()
        assert float(losses[d]) == pytest.approx(kl.item(), rel=1e-4)
        (grad,) = torch.autograd.grad(kl, weight, retain_graph=True)
        torch.testing.assert_close(grads[d], grad[d], rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in model.hf.parameters())
    with torch.no_grad():
        update.weight -= 1e-2 * grads
    assert (update.gradients(acts) < losses).all()


def test_after_training_it_is_nearer_to_the_model_than_the_logit_lens_at_every_depth_of_held_out_text():
    model = subjects.miniworld()
    got = ca.lenses.tuned_lens(model, held_out(), trained(), each_position=True, samples=1)
    assert (got.divergence[:-1] < 0.6 * got.logit_divergence[:-1]).all()
    assert (got.divergence_interval[:-1, 1] < got.logit_divergence_interval[:-1, 0]).all()
    assert got.divergence[-1] == got.logit_divergence[-1]


def test_a_stopped_training_goes_on_with_the_same_bits(tmp_path):
    model, plan = subjects.random_llama(), ca.training.Plan(tokens=600, log_every=3)
    ends = []
    for stops in ((None,), (4, None)):
        out = tmp_path / str(len(stops))
        for stop in stops:
            texts = ca.streams.from_texts(subjects.corpus()[:24])
            sites, packing = ca.lenses.lens_sites(model), ca.streams.Packing(24)
            stream = ca.streams.LiveStream(model, texts, sites, packing=packing, batch=64, window=128)
            loop = ca.training.Loop(update := TunedLensUpdate(model), stream, plan, out)
            loop.start()
            loop.run(stop)
        ends.append((update.lens(loop), (out / "log.jsonl").read_text().splitlines()))
    (whole, lines), (resumed, other) = ends
    assert bool(whole.weight.any())
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)
    said = [[d for x in log if (d := json.loads(x).get("divergence")) is not None] for log in (lines, other)]
    assert len(said[0]) > 2
    assert said[0] == said[1]


def test_a_saved_lens_opens_to_the_same_numbers_and_is_refused_by_another_model(tmp_path):
    model, lens = example()
    back = ca.lenses.open_lens(lens.save(tmp_path))
    task = subjects.llama_task()
    one, two = (ca.lenses.tuned_lens(model, task, t, samples=1) for t in (lens, back))
    assert all(torch.equal(t, two.tensors()[n]) for n, t in one.tensors().items())
    assert two.record["subjects"]["lens"] == one.record["subjects"]["lens"]
    other = subjects.random_llama(1)
    with pytest.raises(Refused, match="other weights"):
        ca.lenses.tuned_lens(other, task, back)
    moved = ca.lenses.tuned_lens(other, task, back.transferred(), samples=1)
    assert moved.record["subjects"]["lens"]["transferred"]["name"] == model.name
    with pytest.raises(Refused, match="width"):
        ca.lenses.tuned_lens(subjects.miniworld(), task, back.transferred())


def test_a_training_leaves_a_lens_in_its_folder_and_does_not_begin_again(tmp_path):
    model, size = subjects.random_llama(), dict[str, Any](tokens=200, batch=64, context=24)
    lens = ca.lenses.train_tuned_lens(model, subjects.corpus()[:12], **size, out=tmp_path)
    lines = list[Any]()
    again = ca.lenses.train_tuned_lens(model, subjects.corpus()[:12], **size, out=tmp_path, on_log=lines.append)
    assert torch.equal(again.weight, lens.weight)
    assert lines == []
    assert ca.lenses.open_lens(tmp_path).about["training"]["tokens"] >= 200
    with pytest.raises(Refused, match="other"):
        ca.lenses.train_tuned_lens(model, subjects.corpus()[:12], **size, rate=1.0, out=tmp_path)


def eleuther(folder: Any, lens: TunedLens, **changes: Any) -> Any:
    """A folder as EleutherAI's library writes it, from the state dict of its list of linear layers."""
    layers = torch.nn.ModuleList(torch.nn.Linear(lens.weight.shape[1], lens.weight.shape[1]) for _ in lens.weight)
    state = {f"{i}.weight": weight for i, weight in enumerate(lens.weight)}
    layers.load_state_dict(state | {f"{i}.bias": bias for i, bias in enumerate(lens.bias)})
    torch.save(layers.state_dict(), folder / "params.pt")
    config = {"base_model_name_or_path": "random", "base_model_revision": None, "lens_type": "linear_tuned_lens"}
    config |= {"d_model": lens.weight.shape[-1], "num_hidden_layers": len(layers), "bias": True, "unembed_hash": None}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_folder_of_eleutherai_is_read(tmp_path):
    model, lens = example()
    read = ca.lenses.open_lens(eleuther(tmp_path, lens))
    assert torch.equal(read.weight, lens.weight)
    assert torch.equal(read.bias, lens.bias)
    weight = model.hf.lm_head.weight.detach().numpy()
    task, ours = subjects.llama_task(), hashlib.sha256(weight.tobytes()).hexdigest()
    for said, noted in ((ours, False), ("0" * 64, True)):
        read = ca.lenses.open_lens(eleuther(tmp_path, lens, unembed_hash=said))
        record = ca.lenses.tuned_lens(model, task, read, samples=1).record
        assert any("hash of the unembedding" in n for n in record.get("notes", [])) == noted
    with pytest.raises(Refused, match="numbers of layers differ"):
        ca.lenses.open_lens(eleuther(tmp_path, lens, num_hidden_layers=3))


def test_code_in_a_parameter_file_is_refused(tmp_path):
    _, lens = example()
    eleuther(tmp_path, lens)
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return ran.touch, ()

    torch.save({"0.weight": Code()}, tmp_path / "params.pt")
    with pytest.raises(Refused, match="code"):
        ca.lenses.open_lens(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("config", [{}, {"kind": "tuned lens", "version": 1}, {"lens_type": "other"}, []])
def test_other_folders_are_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused):
        ca.lenses.open_lens(tmp_path)


def test_models_and_streams_without_a_lens_are_refused():
    with pytest.raises(Refused, match="unembedding"):
        ca.lenses.train_tuned_lens(subjects.family("bert"), ["w1 w2"])
    model = subjects.random_llama()
    with pytest.raises(Refused, match="without text"):
        ca.lenses.train_tuned_lens(model)
    texts = ca.streams.from_texts(subjects.corpus()[:2])
    with pytest.raises(Refused, match=r"without resid_pre\.0"):
        ca.lenses.train_tuned_lens(
            model, ca.streams.LiveStream(model, texts, "resid_post.1", packing=ca.streams.Packing(24))
        )
