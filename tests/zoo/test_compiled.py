"""Compiled programs: they compute what the same programs compute in plain Python, and their circuits are known."""

from __future__ import annotations

import random
import time
from functools import cache
from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.interventions.edge_truth import ABLATIONS, edge_effects, functional, identifiable
from cutaway.models.edits.library import Add
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.zoo.compiled import PROGRAMS, Program, lay_out, structural
from cutaway.zoo.compiled.language import everything, indices, mapped, select, tokens


@cache
def model(name: str) -> Model:
    return ca.load(f"compiled/{name}", check=False)


def edges(of: Wiring, some: torch.Tensor) -> set[str]:
    return {str(e) for e, (u, v) in zip(of.edges, of.pairs.tolist(), strict=True) if some[u, v]}


def says(of: Model, said: list[str], last: int) -> list[str]:
    """Return the likeliest word after each of the last words."""
    best = of.run([" ".join(said)])[0].argmax(-1)
    return of.tokenizer.convert_ids_to_tokens(best[-last:].tolist())


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_compiled_program_says_what_plain_python_says_at_every_position(name):
    program, rng = PROGRAMS[name], random.Random(7)
    PROGRAMS["shift"].model()  # imports transformers
    spent = time.process_time()
    hf, tokenizer = Program.model(program)
    assert time.process_time() - spent < 1, "seconds of compilation"
    texts: dict[int, list[list[str]]] = {}
    for _ in range(300):
        said = program.draw(rng, rng.randint(program.shortest, program.longest))
        texts.setdefault(len(said), []).append(said)
    asked = 0
    for length, some in texts.items():
        ids = torch.tensor([tokenizer(" ".join(s))["input_ids"] for s in some])
        assert ids.shape[1] == length + 1, "the beginning of the text and one token a word"
        best = hf(ids).logits.argmax(-1)
        for said, row in zip(some, best.tolist(), strict=True):
            right = [program.answer(said[: n + 1]) for n in range(length)]
            given = tokenizer.convert_ids_to_tokens(row[1:])
            assert all(r in (None, g) for r, g in zip(right, given, strict=True)), (said, right, given)
            asked += sum(r is not None for r in right)
    assert asked >= 300


@pytest.mark.parametrize("name", ["parity", "palindrome"])
def test_norms_are_the_identity_and_every_site_passes_the_self_check(name):
    of = ca.load(f"compiled/{name}")
    assert not of.disabled
    last = of.shape.n_layers - 1
    acts = of.capture([r.clean for r in PROGRAMS[name].lines(8)], ["resid_pre", "attn_in", "resid_mid", "mlp_in"])
    for i in range(last + 1):
        assert torch.allclose(acts[f"attn_in.{i}"], acts[f"resid_pre.{i}"], atol=2e-6)
        assert torch.allclose(acts[f"mlp_in.{i}"], acts[f"resid_mid.{i}"], atol=2e-6)


def test_the_structural_circuit_is_the_program_without_what_is_computed_beside_it():
    of = model("reverse")
    found = edges(wiring(of), structural(of, wiring(of)))
    assert found == {
        "embed→k_in.0.0", "embed→v_in.0.0",  # where the = is
        "embed→mlp_in.0", "z.0.0→mlp_in.0",  # the index that mirrors the own one
        "mlp_out.0→q_in.1.0", "embed→k_in.1.0", "embed→v_in.1.0", "z.1.0→logits",  # the letter there
    }  # fmt: skip
    active = of.capture(["a b c d = d"], ["z"])["z.0"].abs().amax((0, 1, 3))
    assert (active > 0.1).sum() == 3, "the two heads beside it are at work"


def test_exact_effects_are_those_of_additions_behind_the_identity_norm():
    of = model("reverse")
    wires, bound = wiring(of), ca.tasks.load("reverse", of, n=8).bind(of)
    places = ["embed", "pos_embed", "head_out.0", "head_out.1", "mlp_out.0", "mlp_out.1"]
    own, other = of.capture(bound.clean, places), of.capture(bound.corrupt, places)

    def moved(u: Any) -> torch.Tensor:
        at = ("embed", "pos_embed") if u.layer is None else (f"{'mlp' if u.unit is None else 'head'}_out.{u.layer}",)
        change = torch.stack([other[a] - own[a] for a in at]).sum(0)
        return change if u.unit is None else change[:, :, u.unit]

    ends = [(moved(wires.writers[u]), wires.readers[v]) for u, v in wires.pairs.tolist()]
    edits = [[Add("resid_post.1" if v.layer is None else v, change)] for change, v in ends]
    want = sweep(of, bound.clean, edits, bound.measure) - of.measure(bound.clean, bound.measure)
    got = edge_effects(of, bound, wires, "corrupt")
    assert torch.allclose(got, want, atol=1e-4)
    assert float(got.abs().max()) > 10


def test_each_truth_lies_in_the_one_before_and_exchange_misses_what_no_two_texts_differ_in():
    of, wires = model("majority"), wiring(model("majority"))
    task = ca.tasks.load("majority", of, n=8)
    built = structural(of, wires)[wires.heard]
    works = functional(of, task, wires)
    found = {how: identifiable(of, task, wires, how) for how in ABLATIONS}
    assert torch.equal(works, built)
    assert torch.equal(found["mean"], built)
    assert all(bool((f & ~works).sum() == 0) for f in found.values())
    lost = [str(e) for e, b, f in zip(wires.edges, built, found["corrupt"], strict=True) if b and not f]
    assert lost == ["embed→k_in.0.0", "embed→mlp_in.0"], "the mark of the beginning, which all texts have"


def test_a_program_of_ones_own_has_defaults_ranks_and_no_value_where_nothing_is_selected():
    words = ("x", "y", "none", "0", "1", "2")
    said, index = tokens(words[:2]), indices(4)

    def compiled(expression) -> Model:
        p = Program("own", "", words, lambda: expression, lambda s: None, lambda rng, n: [], longest=4)
        hf, tokenizer = p.model()
        return ca.load(hf, tokenizer=tokenizer, check=False)

    place = mapped(lambda t, i: i if t == "x" else None, said, index)
    last = select(place, None, lambda key, _: key).take(index, 0)  # the rank of a place is its index
    assert says(compiled(mapped(lambda i: ("none", "0", "1", "2", "2")[i], last)), ["y", "x", "y", "x"], 4) == [
        "none", "1", "1", "2",
    ]  # fmt: skip
    mean = mapped(lambda m: "2" if m > 1 else "1" if m > 0 else "0", everything().mean({"x": 3, "y": -1}, said, 4))
    assert says(compiled(mean), ["y", "x", "y", "y"], 4) == ["0", "1", "1", "0"]
    nothing = select(said, None, lambda key, _: False).mean({"x": 1, "y": 1}, said, 4)
    assert says(compiled(mapped(lambda m: "1" if m > 0 else "0", nothing)), ["x", "y"], 2) == ["0", "0"]


def test_a_folder_of_it_is_an_ordinary_checkpoint(tmp_path):
    folder = ca.zoo.entry("compiled/shift").train(tmp_path / "shift")
    again = ca.load(folder, check=False)
    assert torch.equal(again.run(["a b c"]), model("shift").run(["a b c"]))
    assert ca.load("compiled/shift", dtype="float64", check=False).dtype == torch.float64


def test_tasks_of_a_program_are_its_own_and_answered():
    of = model("sort_unique")
    assert ca.tasks.names(of) == ["sort_unique"]
    task = ca.tasks.load("sort_unique", of, n=32, seed=3)
    bound = task.bind(of, "accuracy")
    assert of.measure(bound.clean, bound.measure).eq(1).all()
    assert of.measure(bound.corrupt, bound.measure).eq(0).all()
    assert task.pairs == ca.tasks.load("sort_unique", of, n=32, seed=3).pairs
    assert len({len(p.clean) for p in task}) > 1
    assert of.tokens("a b=a").ids.equal(of.tokens("a b = a").ids), "as explain writes an answer behind a mark"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: ca.tasks.load("reverse", model("shift")), "no task has that name"),
        (lambda: ca.tasks.load("shift", model("shift"), corruption="abc"), "does not make it"),
        (lambda: ca.tasks.load("shift", model("shift"), split="test"), "withheld"),
        (lambda: structural(ca.load("induction"), wiring(model("shift"))), "not compiled"),
        (lambda: lay_out(everything().width(3), ("a",), 3), "words alone"),
        (lambda: ca.load("compiled/shift", dtype="int8"), "quantised"),
    ],
)
def test_refusals(call, why):
    with pytest.raises(Refused, match=why):
        call()
