"""Faults that were once found on these two models, each as what is right: the number, or a refusal in words."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import warnings

import pytest
import torch

import cutaway as ca
from cutaway.models import Ablate, Knockout, Scale
from cutaway.models.self_check import disabled_sites
from cutaway.tasks import Pair, Task
from tests.real import plain, sets

only_smollm2 = pytest.mark.parametrize("name", ["smollm2"], indirect=True)
only_gemma3 = pytest.mark.parametrize("name", ["gemma3"], indirect=True)
QUESTION = "The capital of France is"
PAIR = Pair(QUESTION, "The capital of Japan is", "Paris", "Tokyo")


def test_self_check(model, name, results):
    """Every identity holds in float32; the seconds are written down, not judged."""
    began = time.process_time()
    outcomes = ca.self_check(model)
    spent = time.process_time() - began
    failed = [o.name for o in outcomes if not o.passed]
    _checked(results, "float32", outcomes, spent)
    assert not failed


@pytest.mark.parametrize(("name", "dtype"), [("smollm2", "bfloat16"), ("smollm2", "float16"), ("gemma3", "bfloat16")],
                         indirect=["name"])  # fmt: skip
def test_half_precision_loses_no_site(folder, results, dtype):
    """What a dtype rounds away is no fault of a site."""
    half = ca.load(folder, dtype=dtype, check=False)
    began = time.process_time()
    outcomes = ca.self_check(half)
    _checked(results, dtype, outcomes, time.process_time() - began)
    assert not disabled_sites(outcomes)


def _checked(results, dtype: str, outcomes, seconds: float) -> None:
    lost = disabled_sites(outcomes)
    counts = {"identities": len(outcomes), "failed": sum(not o.passed for o in outcomes), "sites lost": len(lost)}
    numbers = {k: {"value": v} for k, v in counts.items()} | {"CPU seconds": {"value": seconds}}
    results.row("checks", dtype, 1, **numbers)


@only_smollm2
@pytest.mark.parametrize(
    ("prompt", "answer", "foil"),
    [
        ('The word "cat" means a small animal and the word "dog"', "means", "is"),
        ("It was the worst of times, said the workers'", "union", "party"),
        ("There was only one problem -", "the", "a"),
        ("My favourite programming languages are C++ and C#", "and", "but"),
        ('She opened the door and said "', "Hello", "The"),
        ("The answer (", "a", "b"),
    ],
)
def test_an_answer_is_the_form_that_the_model_says(model, prompt, answer, foil):
    """After a closing mark that is the word with its space, after an opening one without; or both forms are quoted."""
    try:
        bound = Task("marks", (Pair(prompt, prompt, answer, foil),)).bind(model)
    except ca.Refused as refusal:
        said = str(refusal)
    else:
        said = None
    if said is not None:
        assert all(repr(form) in said for form in (answer, f" {answer}"))
        return
    p = model.run_last(prompt)[0].softmax(-1)
    forms = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, f" {answer}")]
    likeliest = max((ids[0] for ids in forms if len(ids) == 1), key=lambda i: float(p[i]))
    assert int(bound.answers[0]) == likeliest


@pytest.mark.parametrize("before", ["Istanbul", "İİİİİİİİ", "ŞİŞLİ, İZMİR", "ﬁne ẞ", "𝕀𝕤𝕥𝕒𝕟𝕓𝕦𝕝"])
def test_a_subject_is_where_it_stands(model, before):
    """Letters whose lower case is longer, and letters of several bytes, move nothing."""
    clean, corrupt = (f"{before} aside, the capital of {c} is" for c in ("France", "Japan"))
    bound = Task("subject", (Pair(clean, corrupt, "Paris", "Tokyo", subject="France"),)).bind(model)
    assert bound.span("subject").equal(bound.changed)
    assert [bound.clean.pieces[0][i].strip() for i in bound.clean.find(0, "france")] == ["France"]


@only_gemma3
def test_a_prompt_that_begins_with_bos_has_one(model):
    """Written out or not, the first token is there once; or a warning says how many there are."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tokens = model.tokens(f"<bos>{QUESTION}")
    bos = int((tokens.ids == model.tokenizer.bos_token_id).sum())
    assert bos == 1 or any("2" in str(w.message) for w in told)
    if bos == 1:
        assert torch.equal(model.run_last(tokens), model.run_last(QUESTION))


@only_gemma3
def test_float16_overflows_and_is_refused_everywhere(folder):
    """The stream of Gemma 3's first token passes 65504: no method gives a number, each says what to use instead."""
    half = ca.load(folder, dtype="float16", check=False)
    task = Task("half", (PAIR,))
    assert not bool(plain.last(half.hf, half.tokenizer(QUESTION)["input_ids"]).isfinite().all())
    tries = {
        "logit_lens": lambda: ca.lenses.logit_lens(half, task, samples=1),
        "direct_attribution": lambda: ca.lenses.direct_attribution(half, task, samples=1),
        "activation": lambda: ca.patching.activation(half, task, site="z.3", samples=1),
        "attribution": lambda: ca.patching.attribution(half, task, samples=1, audit=1),
        "ablate": lambda: ca.patching.ablate(half, task, layers="3", samples=1),
        "knockout": lambda: ca.patching.knockout(half, task, samples=1),
        "generate": lambda: half.generate(QUESTION, 3),
    }
    for what, call in tries.items():
        with pytest.raises(ca.Refused) as refusal:
            call()
        assert "bfloat16" in str(refusal.value), what


@only_smollm2
def test_other_weights_are_another_model(model):
    """One row of a large tensor, negated, is seen by the fingerprint; put back, it is the old one."""
    before = model.fingerprint()
    row = model.text.token_id("capital")
    weight = model.hf.get_input_embeddings().weight
    with torch.no_grad():
        weight[row] *= -1
        assert model.fingerprint() != before
        weight[row] *= -1
    assert model.fingerprint() == before


@only_smollm2
def test_generation_is_greedy_whatever_the_model_ships(model):
    """A repetition penalty in the model's own settings does not change what is documented as greedy."""
    settings, prompt = model.hf.generation_config, "The cat sat on the mat. The cat sat on the"
    kept = settings.repetition_penalty
    want = model.tokenizer.decode(plain.continued(model.hf, model.tokenizer(prompt)["input_ids"], 10))
    settings.repetition_penalty = 1.3
    try:
        assert model.generate(prompt, 10) == [want]
    finally:
        settings.repetition_penalty = kept


@only_smollm2
def test_every_cache_generates_the_same(model):
    prompt = "The capital of France is Paris. The capital of Japan is"
    n = model.shape.n_layers
    for edits in (Scale("scores.5", 1.0), [Ablate(f"v.{i}@2") for i in range(n)],
                  [Knockout(f"pattern.{i}", (-1,), (2,)) for i in range(n)]):  # fmt: skip
        try:
            static = model.generate(prompt, 5, edits, cache_implementation="static")
        except ca.Refused:
            continue
        assert static == model.generate(prompt, 5, edits)


@only_smollm2
def test_no_word_is_no_token(model):
    with pytest.raises(ca.Refused):
        model.text.token_id("")


@only_smollm2
def test_the_command_of_a_record_repeats(folder, tmp_path):
    """Given to a shell as it stands, it gives the same numbers."""
    task = tmp_path / "a task.jsonl"
    line = {"clean": PAIR.clean, "corrupt": PAIR.corrupt, "answer": PAIR.answer, "foil": PAIR.foil}
    task.write_text(json.dumps(line), "utf-8")
    first = _cutaway("lenses", "logit-lens", "--model", str(folder), "--task", str(task), "--samples", "1")
    command = next(v for v in first["record"].values() if isinstance(v, str) and v.startswith("cutaway "))
    again = _cutaway(*shlex.split(command)[1:])
    assert again["fields"] == first["fields"]


def _cutaway(*arguments: str) -> dict:
    run = [sys.executable, "-m", "cutaway", *arguments, "--json"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_lens_at_the_last_layer_is_the_model(model):
    """Read out of the last stream, the answer has the probability that plain transformers give it."""
    task = sets.task(model, "fact_capital", 4)
    found = ca.lenses.logit_lens(model, task, samples=1)
    p = [
        float(plain.last(model.hf, model.tokenizer(q.clean)["input_ids"]).softmax(-1)[
            sets.next_id(model.tokenizer, q.clean, f" {q.answer}")])
        for q in task
    ]  # fmt: skip
    assert float(found.probability[-1]) == pytest.approx(sum(p) / len(p), rel=1e-4)
    assert float(found.divergence[-1].abs()) < 1e-5
