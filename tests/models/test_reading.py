"""What a measurement reads of a forward: sweeps, runs and gradients of activations against one plain capture each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models.access.reading import Measure, Reads, Seen, jointly
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Add, Knockout, Scale
from cutaway.models.model import Model
from cutaway.models.sweep.cache import resuming
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from tests.models.common import CAUSAL, PADDED, by_turns_widely, gap, model, noise
from tests.models.test_executor import everywhere, metric

WANTED = ("resid_post.0", "resid_pre.1", "z.1", "mlp_out.1", "pattern.1", "resid_mid.2", "embed", "logits")


def read(m: Model) -> list[Address]:
    """Places of every kind that the model has."""
    return [Address(a.split(".")[0], int(a.split(".")[1]) if "." in a else None) for a in WANTED
            if m.sites()[a.split(".")[0]].startswith("read")]  # fmt: skip


def summed(places: list[Address], last: bool = False) -> Measure:
    """A number that tells prompts, places, units and positions apart."""

    def function(seen: Seen, prompt: Tensor) -> Tensor:
        out = torch.zeros(len(prompt))
        assert seen.activations is not None
        mask = seen.activations.tokens.mask
        for n, a in enumerate(places):
            x = seen.activations[a].float()
            axes = a.row.axes.split()
            # [row, column, …]: keys a padding cannot be told by are left out of the sum
            x = x.movedim(axes.index("q_pos"), 1) if "q_pos" in axes else x
            x = x * mask.view(*mask.shape, *[1] * (x.ndim - 2))
            weights = torch.sin(torch.arange(x[0].numel()) + n).view(x[0].shape)
            out = out + (x * weights).flatten(1).sum(1)
        return out * (1 + prompt) + (metric(seen.last_logits, prompt) if last else 0.0)

    return Measure(function, Reads(last, tuple(places)))


def one_by_one(m: Model, t: Tokens, variants: list[list[Edit]], measure: Measure) -> Tensor:
    rows = []
    for v in variants:
        last = m.run_last(t, v) if measure.reads.last_logits else None
        rows.append(measure(Seen(last, m.capture(t, measure.reads.places, v)), torch.arange(len(t))))
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "side"), by_turns_widely(CAUSAL))
def test_a_sweep_of_a_reading_is_one_capture_a_variant(name, side):
    m, t = model(name), PADDED[side]
    variants = everywhere(m)
    deep, last = Address("resid_post", m.shape.n_layers - 1), Address("resid_post", 0)
    for places in (read(m), [deep], [last, Address("resid_pre", 1)]):
        measure = summed(places)
        assert gap(sweep(m, t, variants, measure), one_by_one(m, t, variants, measure)) < 5e-5, places


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "mistral_window"])
def test_prompts_of_one_length_edits_in_every_variant_and_last_logits_beside(name):
    m, t = model(name), PADDED["right"].rows([0])
    base: list[Edit] = [Scale("mlp_out.0", 0.5)]
    variants = [*everywhere(m), [Knockout("pattern.1", (-1,), (0,))]]
    for measure in (summed([Address("z", 1), Address("pattern", 2)]), summed([Address("resid_pre", 2)], last=True)):
        want = one_by_one(m, t, [[*base, *v] for v in variants], measure)
        assert gap(sweep(m, t, variants, measure, base=base), want) < 5e-5
        assert gap(sweep(m, t, variants, measure, base=base, budget=8), want) < 5e-5


def test_forwards_end_at_what_is_read_and_edits_behind_it_cost_nothing():
    m, t = model("llama_gqa"), PADDED["right"].rows([0])
    measure, layers = summed([Address("resid_post", 1)]), m.shape.n_layers
    with counting() as spent:
        m.measure(t, measure)
    assert spent.forwards == pytest.approx(2 / layers)
    variants: list[list[Edit]] = [[Ablate("z.0.1")], [Ablate("z.2.1")], [Add("logits", torch.ones(m.shape.d_vocab))]]
    with counting() as spent:
        values = sweep(m, t, variants, measure)
    assert torch.equal(values[1], values[2])
    assert spent.forwards == pytest.approx((2 + 2 + 2) / layers)  # clean, the first variant, and one without edits
    with counting() as spent:
        m.gradients(t, "resid_pre.0", measure)
    assert spent.forwards == pytest.approx(2 / layers)


def test_a_model_without_unembedding_is_swept_by_what_it_has():
    from transformers import LlamaConfig, LlamaModel

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    m = Model(LlamaModel(LlamaConfig(vocab_size=101, **sizes)).eval())
    measure, variants = summed([Address("resid_post", 1)]), [[Ablate("z.0.1")], [Scale("mlp_out.1@-1", 0.0)]]
    assert gap(sweep(m, PADDED["right"], variants, measure), one_by_one(m, PADDED["right"], variants, measure)) < 2e-5


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama_gqa"])
def test_gradients_of_a_reading_by_central_differences(name):
    m, t = model(name, torch.float64), PADDED["right"]
    measure = Measure(lambda seen, prompt: seen.activations["resid_post.1"].pow(2).sum((1, 2)) * (prompt + 1.0),
                      Reads(False, (Address("resid_post", 1),)))  # fmt: skip
    values, slopes, _ = m.gradients(t, ["resid_pre.0", "mlp_out.1", "z.2"], measure)
    assert torch.equal(values, m.measure(t, measure))
    assert torch.equal(slopes["z.2"], torch.zeros_like(slopes["z.2"]))  # behind what is read
    for site in ("resid_pre.0", "mlp_out.1"):
        step = noise(m.shape.d_model).double() * 1e-4
        up, down = (m.measure(t, measure, Add(f"{site}@1", s)) for s in (step, -step))
        assert gap(slopes[site][:, 1] @ step, (up - down) / 2) < 5e-4


def test_a_gradient_that_nothing_read_depends_on_is_refused():
    m = model("gpt2")
    measure = summed([Address("resid_post", 0)])
    with pytest.raises(Refused, match="does not depend"):
        m.gradients(PADDED["right"], "z.2", measure)


def test_several_measurements_share_a_forward():
    m, t = model("gpt2"), PADDED["right"]
    parts = [
        summed([Address("z", 1)]),
        summed([Address("resid_post", 0)]),
        Measure(lambda s, p: metric(s.last_logits, p)),
    ]
    with counting() as spent:
        got = m.measure(t, jointly(parts))
    assert spent.forwards == len(t)
    assert gap(got, torch.stack([m.measure(t, p) for p in parts], dim=1)) < 1e-6


def test_a_kept_sweep_knows_its_reading(tmp_path):
    m, t = model("gpt2"), PADDED["right"]
    with resuming(tmp_path):
        for layer in (0, 1, 1):
            with counting() as spent:
                sweep(m, t, [[Ablate("z.0.1")]], summed([Address("resid_post", layer)]))
    assert spent.forwards == 0
    assert len(list(tmp_path.iterdir())) == 2
