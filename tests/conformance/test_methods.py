"""What every method of the table must do, whatever it measures. A new row is covered as soon as it is in the table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import cutaway as ca
from cutaway.core.address import Address
from cutaway.core.method import Method, parse_list
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.subject import SUBJECTS, examples, subject
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task
from cutaway.views.draw.terminal import terminal
from cutaway.views.spec import fields
from tests.conformance import subjects
from tests.conformance.rows import (
    CHANCE,
    FIXED,
    NAMED,
    OF_MANY,
    OPTIONS_WIDELY,
    QUICK,
    ROWS,
    TOGETHER,
    Spy,
    arguments,
    batch,
    call,
    everything,
    found,
    given,
    half_trained,
    kinds,
    methods,
    near,
    numeric,
    numeric_widely,
    of_kind,
    of_models_widely,
    of_prompts_widely,
    outcomes,
    same,
    settled,
    variants,
    watched,
)


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_every_subject_has_an_example_of_its_type_that_can_be_split_and_joined(name):
    model, row = subjects.miniworld(), SUBJECTS[name]
    thing = examples([name], {"model": model})[name]
    assert isinstance(thing, row.type)
    assert thing.identity()
    assert all(isinstance(v, int) for v in thing.sizes().values())
    assert row.flags[0].name.startswith(name)
    assert (row.split is None) == (row.join is None)
    if row.split is not None:
        assert row.join(row.split(thing)).identity()["hash"] == thing.identity()["hash"]


@methods
def test_methods_take_the_type_that_a_subject_is_registered_with_or_a_narrower_one(name):
    row = ROWS[name]
    every = [(subject(s).type, kinds) for s, kinds in zip(row.subjects, row.kinds, strict=True)]
    assert all(any(issubclass(k, own) for k in kinds) for own, kinds in every)
    assert [len(names) for names in ca.methods()[row.name].takes()] == [len(kinds) for kinds in row.kinds]


#: fields of methods that fit on a drawn part of their data, or say what stands out of a drawn null: drawn themselves
DRAWN = {
    "heads.card": {"claimed"},
    "heads.card(model, repeats)": {"claimed"},
    "heads.classify": {"claimed"},
    "heads.classify(model, repeats)": {"claimed"},
    "heads.function_vectors": {"claimed"},
    "heads.retrieval": {"claimed", "overlap"},
    "heads.successor": {"claimed", "change"},
    "heads.roles": {"claimed", "grown", "change", "looks", "removed"},
    "lenses.token_relevance": {"gain", "curve"},
    "lenses.token_relevance(model, prompts)": {"gain", "curve"},
    "dictionaries.probing": {"accuracy", "each"},
    "dictionaries.quiver": {
        "auroc",
        "validation",
        "gain",
        "with_dictionary",
        "without_dictionary",
        "lost",
    },
    "directions.find": {"auroc", "vector", "midpoint", "cosine"},
    "directions.probe": {"accuracy", "auroc", "control", "selectivity", "words", "majority", "curve", "words_curve"},
    "dictionaries.shift": {"accuracy", "worst", "group", "reading", "effect", "with_words"},
    "graphs.feature_circuit": {"estimate", "exact", "agreement", "chance"},
    "dictionaries.letter_absorption": {"score"},
    "directions.complete": {"loss", "each", "component", "repeated"},
    "features.contrast": {"auroc"},
    "directions.threshold": {"recall", "false_positive"},
    "directions.erase": {"linear", "mlp", "moved"},
    "directions.das": {"margin", "iia", "preferred", "control", "loss", "slope", "boundary", "basis", "apart"},
    "directions.interchange": {"margin", "iia", "preferred", "floor", "ceiling"},
    "directions.select": {"bypass", "induce", "kl", "plain", "passes", "vector", "midpoint"},
    "directions.monitor": {"auroc", "recall", "false_positive", "detected", "threshold"},
    "directions.suffix": {"share", "each", "control", "loss"},
    "directions.reweight": {"share", "control", "log_prob", "kept", "loss", "factor", "changed"},
    "directions.intervene": {"share", "other", "kept", "kl", "perplexity", "component", "zero"},
    "circuits.certify": {"deviation", "shuffled", "weakest"},
    "circuits.minimality": {"pair", "excess"},
    "circuits.completeness": {"gap", "circuit", "model"},
    "directions.propagate": {"control_gain", "control_exponent", "control_kl", "control_linear_range"},
    "circuits.random": {"score"},
    "circuits.acdc": {"exact", "agreement", "frequency"},
    "circuits.exact": {"frequency"},
    "circuits.information_flow": {"frequency"},
} | {name: {"excess"} for name in ROWS if name.startswith("graphs.trace")}
DRAWN |= {
    f"editing.{n}": {"share", "preferred", "each", "kl", "size", "rounding"}
    for n in ("rome", "memit", "emmet", "alpha_edit")
}
DRAWN |= {
    f"circuits.{n}": {"score", "kept", "exact", "agreement"}
    for n in ("edge_pruning", "subnetwork_probing", "uniform_gradient_sampling")
}
DRAWN |= {
    f"circuits.{n}": {"exact", "agreement", "frequency"}
    for n in ("eap", "eap_ig", "eap_ig_activations", "clean_corrupted", "relp", "mask_gradients")
}


@numeric
@kinds
def test_another_seed_changes_only_what_is_drawn(name, kind):
    assert "seed" in {o.name for o in ROWS[name].options}
    one, other = found(name, kind), found(name, kind, seed=1)
    assert same(one, other, settled(one, CHANCE, OF_MANY) - DRAWN.get(name, set()))
    null = of_kind(one, CHANCE)
    assert null is not None
    assert not torch.equal(getattr(one, null), getattr(other, null))
    assert one.sizes() == other.sizes()


@pytest.mark.parametrize(("name", "options"), OPTIONS_WIDELY)
def test_the_model_and_all_chance_stay_untouched(name, options):
    parts, untouched = watched(name, **options)
    assert untouched
    assert all(not t.requires_grad for part in parts for t in part.tensors().values())
    if not options or options in TOGETHER.get(name, []):  # the same seed, the same bits; dropout was off while it ran
        again = outcomes(name, given(name, "llama"), **options)
        assert all(same(a, b, set(a.tensors())) for a, b in zip(parts, again, strict=True))


@of_models_widely
def test_a_failing_call_leaves_the_model_untouched_too(name, monkeypatch):
    model = half_trained()
    before, calls = Spy(model).state(), []
    forward = type(model.hf.model.norm).forward

    def failing(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:  # two layers have four of these norms: in the middle of the first forward
            raise MemoryError("no more")
        return forward(self, x)

    with monkeypatch.context() as m:
        m.setattr(type(model.hf.model.norm), "forward", failing)
        errors = MemoryError, Refused  # a method about weights alone need not run the model
        with suppress(*errors) if ROWS[name].cost == "0" else pytest.raises(errors):
            outcomes(name, arguments(name, model, subjects.llama_task()))
    assert Spy(model).state() == before


@of_prompts_widely
def test_one_prompt_and_the_same_prompt_repeated_agree(name):
    row, model, task = batch(name), subjects.random_llama(), subjects.llama_task(1)
    prompt = task if row.name == "task" else row.example({"model": model, "task": task})
    one, three = (call(name, arguments(name, model, task, **{row.name: p})) for p in (prompt, row.join([prompt] * 3)))
    for field in settled(one, CHANCE, OF_MANY) - DRAWN.get(name, set()):
        t, other, axes = getattr(one, field), getattr(three, field), one.axes()[field]
        if "prompt" in axes:
            t = torch.cat([t] * 3, dim=axes.index("prompt"))
        assert near(other, t), field


#: methods whose values are ratios of means over prompts, of which the two ends are means themselves
RATIOS = {f"circuits.{n}" for n in ("faithfulness", "completeness", "minimality", "certify")}


@of_prompts_widely
def test_several_prompts_of_several_lengths_agree_with_each_alone(name):
    model, task = subjects.random_llama(), subjects.uneven_task()
    assert len(set(task.bind(model).clean.lengths.tolist())) == 3
    fixed = FIXED.get(name, {})
    row = batch(name)
    prompts = task if row.name == "task" else row.example({"model": model, "task": task})
    together = call(name, arguments(name, model, task, **{row.name: prompts}), **fixed)
    alone = [call(name, arguments(name, model, task, **{row.name: p}), **fixed) for p in row.split(prompts)]
    axes, got = together.axes()[together.main], getattr(together, together.main)
    each = [getattr(r, r.main) for r in alone]
    if "split" in together.record:  # what it measures on some prompts it chose on others, and it says so
        assert "measured on" in together.record["split"]
        return
    if name in RATIOS:
        for end in ("whole", "empty"):
            assert near(getattr(together, end), torch.stack([getattr(r, end) for r in alone]).mean(0))
        return
    if "prompt" in together.record:  # it looks at the first prompt only, and says so
        assert near(got, each[0])
        return
    if "position" in axes:  # counted from the end where prompts differ in length
        at = axes.index("position")
        each = [e.narrow(at, e.shape[at] - got.shape[at], got.shape[at]) for e in each]
    assert near(got, torch.stack(each).mean(0))


@of_models_widely
def test_left_and_right_padding_agree(name, monkeypatch):
    task, tokens = subjects.uneven_task(), Model.tokens
    right = call(name, arguments(name, subjects.random_llama(), task))
    monkeypatch.setattr(
        Model, "tokens", lambda self, prompts, side="left", bos=None: tokens(self, prompts, "left", bos)
    )
    assert task.bind(subjects.random_llama()).clean.side == "left"
    left = call(name, arguments(name, subjects.random_llama(), task))
    for field in settled(right, CHANCE):
        assert near(getattr(left, field), getattr(right, field)), field
    assert left.labels == right.labels


@methods
@kinds
def test_outcomes_survive_files_and_every_picture(name, kind, tmp_path):
    for part in everything(name, kind):
        assert isinstance(part, ROWS[name].results)
        if isinstance(part, Result):
            survives(part, tmp_path)
        else:
            assert part.save(tmp_path / "a.safetensors").exists()


def survives(result: Result, tmp_path: Path) -> None:
    """A result comes back from its file, and is shown as a table, in the terminal, as a figure and as a page."""
    back = ca.open(result.save(tmp_path / "a.safetensors"))
    assert type(back) is type(result)
    assert same(back, result, set(result.tensors()))
    assert (back.labels, back.units, back.reasons) == (result.labels, result.units, result.reasons)
    assert (back.facts(), back.record) == (result.facts(), result.record)
    for field, t in result.tensors().items():
        frame = result.frame(field)
        assert len(frame) == t.numel()
        axes = result.axes()[field]
        columns = [
            c for c in frame.columns if c in (field, *axes) or c not in ("source", "target")
        ]  # the ends of edges
        assert columns == [*axes, "value" if field in axes else field]
        if t.ndim and t.numel():
            assert result.top(3, by=field)
    for field in fields(result):
        assert terminal(result, field) is not None
    figure = result.plot()
    figure.canvas.draw()
    import matplotlib.pyplot as plt

    plt.close(figure)
    assert result._repr_html_().startswith("<div")
    entries = {str(name) for names in result.labels.values() for name in names}
    assert all(u in result.tensors() or u in entries for u in result.units)
    assert result.main in result.units, "the main field says its unit"


@methods
@kinds
def test_the_record_is_complete(name, kind):
    for part in everything(name, kind):
        complete(ROWS[name], part.record, given(name, kind)[0])


def complete(row: Method, record: Mapping[str, Any], asked: Model) -> None:
    """A record says all that it must about a call on a model."""
    name = row.name
    assert record["method"] == name
    assert (record["paper"], record["control"], record["answers"]) == (row.paper, row.control, row.answers)
    assert record["rung"] == row.rung
    assert set(record["subjects"]) == set(row.subjects)
    if "model" in row.subjects:
        model = record["subjects"]["model"]
        assert model["name"] == asked.name
        assert model["weights"] == asked.fingerprint()
    if "task" in row.subjects:
        assert re.fullmatch(r"[0-9a-f]{16}", record["subjects"]["task"]["hash"])
    options = {o.name: QUICK.get(o.name, o.default) for o in row.options} | NAMED.get(name, {})
    several = {o.name for o in row.options if o.several}
    plain = {n: list(parse_list(v) if isinstance(v, str) else v) for n, v in options.items() if n in several}
    assert record["options"] == options | plain
    assert record["cost"]["seconds"] > 0
    assert {"python", "cutaway", "torch", "transformers"} <= set(record["versions"])
    assert record["machine"]["device"]


@numeric_widely
def test_a_method_fills_the_fields_that_its_card_lists(name):
    results, listed = [found(name, "llama", **o) for o in variants(ROWS[name])], set[str]()
    for kind in ROWS[name].results:
        listed |= set(ROWS[name].fields(kind)) if issubclass(kind, Result) else set()
    assert {n for r in results for n in (*r.tensors(), *r.facts())} == listed


@numeric
@kinds
def test_the_control_runs(name, kind):
    row, result = ROWS[name], found(name, kind)
    assert row.control
    field = of_kind(result, CHANCE)
    if field is None:
        assert result.reasons[result.main]
        return
    null, axes, of = getattr(result, field), result.axes()[field], field.removesuffix("null").strip("_") or result.main
    assert axes[-1] == "sample"
    assert axes[:-1] == result.axes()[of], "one null a number"
    assert null.shape[-1] > 1
    without = [not bool(row.isfinite().all()) for row in null] if len(axes) >= 2 else [False]
    names = result.labels.get(axes[0], [""] * len(without)) if len(axes) >= 2 else [""]
    assert all(result.reasons.get(n) for n, w in zip(names, without, strict=True) if w), "no null, and no reason"
    null = null[~torch.tensor(without)] if len(axes) >= 2 else null
    assert null.isfinite().all()
    assert (null.std(-1) > 0).any(), "all samples of the null are the same"


@numeric
@pytest.mark.parametrize("prompts", [pytest.param(1, marks=pytest.mark.wide), 3])
def test_an_interval_is_there_or_a_reason_is(name, prompts):
    subject = [s.take(prompts) if isinstance(s, Task | Prompts) else s for s in given(name, "llama")]
    result = call(name, subject)
    interval = result.tensors().get("interval", result.tensors().get(f"{result.main}_interval"))
    if interval is None or bool(interval.isnan().any()):
        assert result.reasons[result.main]
        return
    over_prompts = "requests" not in ROWS[name].subjects  # else the interval is over these
    assert prompts > 1 or not over_prompts or not any(isinstance(s, Task | Prompts) for s in subject)
    main = getattr(result, result.main)
    assert (interval[..., 0] <= main + 1e-5).all(), "the interval covers the mean"
    assert (main <= interval[..., 1] + 1e-5).all()


def encoder() -> Model:
    """A masked language model around the same tokenizer."""
    tok = subjects.tokenizer()
    config = tf.BertConfig(
        vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with torch.random.fork_rng():
        return Model(tf.BertForMaskedLM(config).eval(), tok, "random-bert")


#: methods that read activations and no prediction, and so may be about an encoder
READ_ONLY = {
    "dictionaries.probing", "dictionaries.shift", "dictionaries.letter_absorption", "dictionaries.quiver",
    "directions.find", "directions.probe", "directions.threshold", "directions.monitor", "features.contrast",
    "geometry.similarity",
}  # fmt: skip


@of_models_widely
def test_an_encoder_is_refused(name):
    if name in READ_ONLY:
        assert outcomes(name, arguments(name, encoder(), subjects.llama_task()))
        return
    with pytest.raises(Refused) as refusal:
        ROWS[name].function(*arguments(name, encoder(), subjects.llama_task()))
    assert refusal.value.instead


@methods
def test_wrong_subjects_are_refused(name):
    first, *rest = given(name, "llama")
    wrong = [(), (first, *rest, first), ("miniworld", *rest), (first, 3), (object(), *rest)]
    wrong += [(first,), (*rest, first)] if rest else []
    wrong += [(first.hf, *rest)] if isinstance(first, Model) else []
    for asked in wrong:
        with pytest.raises(Refused) as refusal:
            ROWS[name].function(*asked)
        assert type(first).__name__ in refusal.value.why


@methods
def test_wrong_options_are_refused(name):
    row = ROWS[name]
    with pytest.raises(Refused, match="no such option"):
        row.function(*given(name, "llama"), **{f"{row.options[0].name}s": 1})
    for o in row.options:
        plain: dict[type, list[Any]] = {int: [-1, 2**63, 1.5, "3", True], bool: [1, "yes"], str: [3],
                                        float: [math.nan, "x"], Path: [3]}  # fmt: skip
        lists: dict[type, list[Any]] = {int: [-1, [-1], 1.5, "x", [1.5], [True]], str: [3, [3]],
                                        float: ["x", [True], [math.nan]], Address: [3, ["z", 3], [], ""]}  # fmt: skip
        wrong = (lists if o.several else plain)[o.type]
        for value in [*wrong, *(["sideways"] if o.choices else []), *([] if o.optional else [None])]:
            with pytest.raises(Refused) as refusal:
                row.function(*given(name, "llama"), **{o.name: value})
            assert o.name in refusal.value.what


@pytest.mark.parametrize("name", [n for n, r in ROWS.items() if "site" in {o.name for o in r.options}])
@pytest.mark.parametrize("site", ["nonsense", "", "z.99", "embed", "logits", "ln1.scale", "final.scale", "router"])
def test_a_wrong_site_is_refused(name, site):
    with pytest.raises(Refused) as refusal:
        ROWS[name].function(*given(name, "llama"), site=site)
    assert repr(site) in refusal.value.what or site in refusal.value.what


@methods
def test_a_control_without_samples_is_refused(name):
    assert "samples" in {o.name for o in ROWS[name].options}
    with pytest.raises(Refused, match="at least 1"):
        ROWS[name].function(*given(name, "llama"), samples=0)


@methods
def test_the_module_says_question_paper_control_and_cost(name):
    row = ROWS[name]
    doc = import_module(row.function.__module__).__doc__ or ""
    assert doc.split("\n")[0] == row.answers
    assert row.answers.endswith("?")
    author, year = row.paper.split()[0], re.search(r"\b(19|20)\d\d\b", row.paper)
    assert year is not None
    assert author in doc
    assert year[0] in doc
    for word in ("Control", "Cost"):
        assert word in doc, word
    assert all(o.help for o in row.options), "every option has its line in Args"
    assert "Raises:" in (row.function.__doc__ or "")


def test_no_field_of_a_result_hides_a_method():
    with pytest.raises(TypeError, match="top"):
        type("Hiding", (Result,), {"__annotations__": {"top": torch.Tensor}}, kind="hiding_of_tests")


def test_a_number_alone_has_a_frame():
    frame = found("patching.group", "llama").frame("effect")
    assert frame["effect"].tolist() == [pytest.approx(float(found("patching.group", "llama").effect))]
