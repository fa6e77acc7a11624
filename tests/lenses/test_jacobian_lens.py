"""The Jacobian lens: equal to Jacobians by brute force, exact in a linear network, its files and its edits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.core.subject import Flag, subject
from cutaway.lenses.jacobian import JacobianLens
from cutaway.lenses.jacobian_estimation import ContextSource, JacobianUpdate, positions
from cutaway.lenses.lens import depth_address, token_readers
from cutaway.lenses.tuned_training import documents_of
from cutaway.models.model import Model
from cutaway.streams import Packing
from cutaway.tasks.prompts import as_prompts
from tests.conformance import subjects

CONTEXT, SKIP = 10, 3
NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}  # the family computes its norms in float32


@cache
def tiny(layers: int = 2) -> Model:
    """A Llama with grouped heads in float64, small enough for whole Jacobians."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = dict[str, Any](hidden_size=8, intermediate_size=12, num_attention_heads=4, num_key_value_heads=2)
        config = subjects.config(**sizes, num_hidden_layers=layers, attention_dropout=0.0)
        hf = tf.LlamaForCausalLM(config).double().eval()
        with torch.no_grad():
            for p in hf.parameters():
                p.mul_(20.0 if p.ndim > 1 else 1.0)
    return Model(hf, subjects.tokenizer(), "tiny")


def texts(n: int = 3) -> list[str]:
    return [" ".join(subjects.corpus()[3 * i : 3 * i + 3]) for i in range(n)]


def estimated(model: Model, n: int = 3, **more: Any) -> JacobianLens:
    size = dict[str, Any](tokens=n * CONTEXT, context=CONTEXT, skip=SKIP, batch=2 * CONTEXT)
    return ca.lenses.estimate_jacobian_lens(model, texts(), **{**size, **more})


def contexts(model: Model, n: int) -> torch.Tensor:
    """The first contexts of the texts: documents one after the other, each context beginning with the token."""
    ids = []
    for text in texts():
        ids += [0, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows, at = [], 0
    while len(rows) < n:
        first = [] if ids[at] == 0 else [0]
        rows.append(first + ids[at : at + CONTEXT - len(first)])
        at += CONTEXT - len(first)
    return torch.tensor(rows)


def whole_jacobian(model: Model, ids: torch.Tensor, depth: int) -> torch.Tensor:
    """∂ last[p', i] / ∂ h[p, j] as [p', i, p, j], by running the blocks that are left on a stream as it is."""
    llama = model.hf.model
    with torch.no_grad():
        h = model.hf(ids, output_hidden_states=True).hidden_states[depth]
    place = torch.arange(ids.shape[1])[None]
    rope = llama.rotary_emb(h, place)
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf, dtype=h.dtype).triu(1)[None, None]

    def rest(x: torch.Tensor) -> torch.Tensor:
        for layer in llama.layers[depth:]:
            x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=place)
            x = x if isinstance(x, torch.Tensor) else x[0]
        return x

    j: Any = torch.autograd.functional.jacobian(rest, h)
    return j[0, :, :, 0]


def test_it_is_the_mean_over_positions_of_summed_jacobians():
    model, valid = tiny(), slice(SKIP, CONTEXT - 1)
    lens = estimated(model)
    assert lens.weight.dtype == torch.float64
    assert lens.about["estimation"]["contexts"] == 4  # batches of two
    for depth in range(2):
        each = [whole_jacobian(model, ids[None], depth)[valid, :, valid] for ids in contexts(model, 4)]
        sums = [j.sum(0).mean(1) for j in each]
        mean = torch.stack(sums).mean(0)
        torch.testing.assert_close(lens.weight[depth], mean, **NEAR)
        halves = [(sums[0] + sums[2]) / 2, (sums[1] + sums[3]) / 2]
        assert float(lens.error[depth]) == pytest.approx(
            float((halves[0] - halves[1]).norm() / 2 / mean.norm()), rel=1e-4
        )


def test_the_share_of_the_position_itself_is_estimated_without_bias(monkeypatch):
    model, valid = tiny(1), range(SKIP, CONTEXT - 1)
    monkeypatch.setattr("cutaway.lenses.jacobian_estimation.PROBES", 200)
    lens = estimated(model, 1, batch=CONTEXT)
    j = whole_jacobian(model, contexts(model, 1), 0)
    own = torch.stack([j[p, :, p] for p in valid]).mean(0)
    share = float((own * lens.weight[0]).sum() / lens.weight[0].square().sum())
    assert float(lens.same_position[0]) == pytest.approx(share, abs=0.1)
    assert abs(share - 1) > 0.15  # or the test would not tell it from the whole


def test_in_a_network_without_attention_only_the_position_itself_counts(monkeypatch):
    monkeypatch.setattr("cutaway.lenses.jacobian_estimation.PROBES", 200)
    model = tiny(1)
    kept = [layer.self_attn.o_proj.weight.detach().clone() for layer in model.hf.model.layers]
    hf = model.hf
    try:
        with torch.no_grad():
            for layer in hf.model.layers:
                layer.self_attn.o_proj.weight.zero_()
        lens = estimated(Model(hf, model.tokenizer, "cut"), 2)
        valid = range(SKIP, CONTEXT - 1)
        each = [whole_jacobian(model, ids[None], 0) for ids in contexts(model, 2)]
        own = torch.stack([torch.stack([j[p, :, p] for p in valid]).mean(0) for j in each]).mean(0)
        torch.testing.assert_close(lens.weight[0], own, **NEAR)
        assert float(lens.same_position[0]) == pytest.approx(1.0, abs=0.15)
    finally:
        with torch.no_grad():
            for layer, weight in zip(hf.model.layers, kept, strict=True):
                layer.self_attn.o_proj.weight.copy_(weight)


def test_a_linear_network_is_the_product_of_its_maps(monkeypatch):
    """Attention and MLP that are nothing but maps of the stream leave one matrix per layer."""
    monkeypatch.setattr("cutaway.lenses.jacobian_estimation.PROBES", 200)
    model = tiny()

    class Map(torch.nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            self.matrix = 0.5 * torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).double()

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
            return hidden_states + hidden_states @ self.matrix.T

    hf = tf.LlamaForCausalLM(model.hf.config).double()
    maps = [Map(i) for i in range(2)]
    for layer, linear in zip(hf.model.layers, maps, strict=True):
        layer.forward = linear.forward
    lens = estimated(Model(hf, model.tokenizer, "linear"), 1)
    one = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(lens.weight[1], one + maps[1].matrix, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lens.weight[0], (one + maps[1].matrix) @ (one + maps[0].matrix), rtol=1e-9, atol=1e-9)
    shuffled = estimated(Model(hf, model.tokenizer, "linear"), 1, shuffled=True)
    torch.testing.assert_close(shuffled.weight, lens.weight, rtol=1e-9, atol=1e-9)  # the order of tokens means nothing
    assert lens.error.max() < 1e-12
    assert lens.same_position.tolist() == pytest.approx([1.0, 1.0], abs=0.15)


def test_rows_of_tokens_are_those_of_the_whole_lens_read_by_the_unembedding():
    model, words = tiny(), [" Mary", " John"]
    lens = estimated(model)
    found = ca.lenses.jacobian_directions(
        model, texts(), words, contexts=4, context=CONTEXT, skip=SKIP, batch=2 * CONTEXT
    )
    ids = torch.tensor([model.text.token_id(w) for w in words])
    readers = model.hf.lm_head.weight[ids] * model.hf.model.norm.weight
    assert torch.equal(found.rows[-1], token_readers(model, ids))
    torch.testing.assert_close(found.rows[-1], readers.detach())
    torch.testing.assert_close(found.rows[:-1], torch.stack([readers @ w for w in lens.weight]).detach(), **NEAR)
    whole = ca.lenses.token_directions(model, lens, words)
    torch.testing.assert_close(whole.rows, found.rows, **NEAR)


def test_the_control_is_the_lens_of_the_same_contexts_with_their_tokens_shuffled():
    model, valid = tiny(), slice(SKIP, CONTEXT - 1)
    lens, plain = estimated(model, shuffled=True, batch=CONTEXT), estimated(model)
    source = ContextSource(model, documents_of(model, texts(), ""), Packing(CONTEXT, rows=2), shuffle=0)
    rows = torch.cat([c.ids for c, _ in zip(source, range(2), strict=False)])
    assert torch.equal(rows.sort(-1).values, contexts(model, 4).sort(-1).values)
    assert torch.equal(rows[:, 0], contexts(model, 4)[:, 0])
    assert (rows != contexts(model, 4)).any(1).all()
    each = [whole_jacobian(model, ids[None], 1)[valid, :, valid].sum(0).mean(1) for ids in rows[:3]]
    torch.testing.assert_close(lens.weight[1], torch.stack(each).mean(0), **NEAR)
    assert lens.about["estimation"]["source"]["shuffled tokens"] == 0
    assert float((lens.weight - plain.weight).norm() / plain.weight.norm()) > 0.1


def test_late_in_the_bundled_model_a_lens_reads_held_out_text_better_than_its_control():
    model = subjects.miniworld()
    source = ContextSource(model, documents_of(model, None, ""), Packing(32, rows=48))
    held = as_prompts(next(iter(source)).ids[32:].tolist())
    size = dict[str, Any](tokens=8 * 32, context=32, skip=4, batch=8 * 32)
    lenses = (ca.lenses.estimate_jacobian_lens(model, **size, shuffled=x) for x in (False, True))
    own, shuffled = (ca.lenses.jacobian_lens(model, held, x, each_position=True, samples=1) for x in lenses)
    late = own.labels["layer"].index("4")
    assert float(own.divergence_interval[late, 1]) < float(shuffled.divergence_interval[late, 0])
    assert float(shuffled.divergence[late]) < float(own.logit_divergence[late])


def test_short_and_last_positions_are_left_out():
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    assert positions(real, 1).int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]


def test_a_stopped_estimation_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    model, lines = tiny(), list[Any]()
    whole = estimated(model, out=tmp_path / "whole", on_log=lines.append)
    assert [line["contexts"] for line in lines] == [2, 4]
    assert lines[-1]["error"] == pytest.approx(float(whole.error.max()))
    steps, step = [], JacobianUpdate.step

    def stopping(self: Any, batch: Any, loop: Any) -> int:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(self, batch, loop)

    with monkeypatch.context() as m:
        m.setattr(JacobianUpdate, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            estimated(model, out=tmp_path / "parts")
    resumed = estimated(model, out=tmp_path / "parts")
    assert all(torch.equal(t, resumed.tensors()[n]) for n, t in whole.tensors().items())


def test_a_saved_lens_opens_to_the_same_numbers_and_others_are_refused(tmp_path):
    model = subjects.random_llama()
    lens = subject("jacobian").example({"model": model})
    back = ca.lenses.open_jacobian_lens(lens.save(tmp_path / "jacobian"))
    assert all(torch.equal(t, back.tensors()[n]) for n, t in lens.tensors().items())
    task = subjects.llama_task()
    got = ca.lenses.jacobian_lens(model, task, back, samples=1)
    assert got.record["subjects"]["jacobian"]["hash"] == lens.identity()["hash"]
    with pytest.raises(Refused, match="other weights"):
        ca.lenses.jacobian_lens(subjects.random_llama(1), task, back)
    with pytest.raises(Refused, match="holds a Jacobian lens, not a tuned lens"):
        ca.lenses.open_lens(tmp_path / "jacobian")
    tuned = ca.lenses.identity_lens(model).save(tmp_path / "tuned")
    with pytest.raises(Refused, match="holds a tuned lens, not a Jacobian lens"):
        ca.lenses.open_jacobian_lens(tuned)


def test_the_curve_reads_the_mapped_stream_and_the_identity_is_the_logit_lens():
    model, task = subjects.random_llama(), subjects.llama_task(1)
    lens = subject("jacobian").example({"model": model})
    got = ca.lenses.jacobian_lens(model, task, lens, samples=1)
    ids = task.bind(model).clean.ids
    with torch.no_grad():
        x = model.hf(ids, output_hidden_states=True).hidden_states[1][0, -1]
        p = model.hf.lm_head(model.hf.model.norm(lens.weight[1] @ x)).softmax(-1)
    torch.testing.assert_close(got.probability[1], p[task.bind(model).answers[0]], rtol=1e-4, atol=1e-6)
    assert float(got.divergence[-1]) == float(got.logit_divergence[-1])
    assert got.same_position[:-1].tolist() == lens.same_position.tolist()
    assert (float(got.same_position[-1]), float(got.error[-1])) == (1.0, 0.0)
    one = torch.eye(model.shape.d_model).expand_as(lens.weight).clone()
    plain = JacobianLens(one, lens.error, lens.same_position, lens.same_position_interval)
    got = ca.lenses.jacobian_lens(model, task, plain, samples=1)
    torch.testing.assert_close(got.divergence, got.logit_divergence)


def published(path: Any, **changes: Any) -> Any:
    """A file of the `jlens` library for a model of two layers and width 32: in half precision, of the first block."""
    one = torch.randn(32, 32, generator=torch.Generator().manual_seed(2)).half()
    torch.save({"J": {0: one}, "n_prompts": 7, "source_layers": [0], "d_model": 32, "d_source": 32} | changes, path)
    return path


def test_published_files_are_read_and_the_embedding_by_the_logit_lens(tmp_path):
    model, task = subjects.random_llama(), subjects.llama_task(1)
    lens = ca.lenses.open_jacobian_lens(published(tmp_path / "lens.pt"))
    one = torch.load(tmp_path / "lens.pt", weights_only=True)["J"][0].float()
    got = ca.lenses.jacobian_lens(model, task, lens, samples=1)
    with torch.no_grad():
        x = model.hf(task.bind(model).clean.ids, output_hidden_states=True).hidden_states[1][0, -1]
        p = model.hf.lm_head(model.hf.model.norm(one @ x)).softmax(-1)[task.bind(model).answers[0]]
    torch.testing.assert_close(got.probability[1], p, rtol=1e-4, atol=1e-6)
    assert float(got.divergence[0]) == pytest.approx(float(got.logit_divergence[0]))
    assert got.record["estimated on"] == {"format": "jlens", "embedding": "read by the logit lens", "contexts": 7}
    assert got.error[:-1].isnan().all()
    again = ca.lenses.open_jacobian_lens(lens.save(tmp_path / "own"))
    assert all(torch.equal(t.nan_to_num(9), again.tensors()[n].nan_to_num(9)) for n, t in lens.tensors().items())


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"J": {1: torch.eye(32)}}, "layers 1, not of all"), ({"J": {}}, "layers none"), ({"d_model": 16}, "16 × 16"),
     ({"J": {0: torch.eye(32), 1: torch.eye(32)}}, "3 layers"), ({"J": Flag("x", str, "", "")}, "code")],
)  # fmt: skip
def test_files_that_leave_out_layers_or_hold_code_are_refused(tmp_path, changes, why):
    path = published(tmp_path / "lens.pt", **changes)
    with pytest.raises(Refused, match=why):
        ca.lenses.jacobian_lens(subjects.random_llama(), subjects.llama_task(1), ca.lenses.open_jacobian_lens(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_along_directions_exchange_add_and_remove(dtype):
    model = subjects.family("llama_gqa", dtype)
    lens, words = subject("jacobian").example({"model": model}), ["w3", "w4"]
    found = ca.lenses.token_directions(model, lens, words)
    prompt, near = (
        subjects.numbered(5, 6, 7, 8),
        dict[str, Any](rtol=0.0, atol=1e-5 if dtype == torch.float32 else 0.06),
    )
    for depth in range(model.shape.n_layers + 1):
        place = str(depth_address(depth))
        one, other = (found.unit(depth, w) for w in words)
        read = [lambda x, d=d: x.float() @ d.float() for d in (one, other)]
        old, new, gone, more = (
            model.capture(prompt, place, edits=e)[place][0]
            for e in (
                (),
                found.swap(depth, *words, positions=[-1]),
                found.ablate(depth, *words),
                found.steer(depth, "w3", 2.0, positions=[1]),
            )
        )
        torch.testing.assert_close(read[0](new[-1]), read[1](old[-1]), **near)
        torch.testing.assert_close(read[1](new[-1]), read[0](old[-1]), **near)
        torch.testing.assert_close(new[-1].float().norm(), old[-1].float().norm(), rtol=0.02, atol=0.0)
        assert torch.equal(new[:-1], old[:-1])
        torch.testing.assert_close(read[0](gone), torch.zeros(4), **near)
        torch.testing.assert_close((more - old)[1].float(), 2 * one.float(), **near)
    with pytest.raises(Refused, match="w9"):
        found.unit(0, "w9")


def test_models_contexts_and_texts_without_a_lens_are_refused():
    with pytest.raises(Refused, match="unembedding"):
        ca.lenses.estimate_jacobian_lens(subjects.family("bert"), ["w1 w2"])
    model = subjects.random_llama()
    with pytest.raises(Refused, match="without text"):
        ca.lenses.estimate_jacobian_lens(model, context=32)
    with pytest.raises(Refused, match="takes 64 tokens"):
        ca.lenses.estimate_jacobian_lens(model, ["a"], context=128)
    with pytest.raises(Refused, match="no position left"):
        ca.lenses.estimate_jacobian_lens(model, ["a"], context=16)
    with pytest.raises(Refused, match="no context has a position"):
        ca.lenses.estimate_jacobian_lens(model, ["Mary and John"], context=32)
