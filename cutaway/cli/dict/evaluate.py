"""`cutaway dict eval`: how good a dictionary is, beside its controls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cutaway.cli.dict.files import CHOICE, FILE, FORMAT, opened
from cutaway.cli.repeat import pinned, repeated
from cutaway.cli.shell import Reply, as_data, stages
from cutaway.cli.subjects import DEFAULT_MODEL, load_model
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from cutaway.cli.dict.job import Job
    from cutaway.dictionaries.dictionary import Dictionary
    from cutaway.dictionaries.evaluation.scores import Scores

By = Literal["focus", "frequency", "size"]


def evaluate(
    file: Annotated[str, Parameter(help=f"the dictionary: {FILE}")],
    /,
    *,
    choice: Annotated[list[str] | None, Parameter(help=CHOICE)] = None,
    format: Annotated[str | None, Parameter(help=FORMAT)] = None,
    model: Annotated[str, Parameter(help="zoo name, folder, or Hugging Face id")] = DEFAULT_MODEL,
    text: Annotated[
        str | None, Parameter(help="held-out text: a file, a folder of them, or .jsonl; a zoo world has its own")
    ] = None,
    truth: Annotated[str | None, Parameter(help="judge on a synthetic benchmark (1k, 4k, 16k), not on a model")] = None,
    tokens: Annotated[int, Parameter(help="tokens judged on")] = 32768,
    sequences: Annotated[int, Parameter(help="contexts on which the loss is recovered; 0 leaves that out")] = 32,
    context: Annotated[int, Parameter(help="tokens a context")] = 96,
    features: Annotated[int, Parameter(help="show so many latents in context")] = 0,
    by: Annotated[By, Parameter(help="which latents those are: the clearest, most frequent, or largest")] = "focus",
    labels: Annotated[
        str | None, Parameter(help="probe concepts on texts (.jsonl: text, label), or on facts of the `world`")
    ] = None,
    words: Annotated[
        str | None, Parameter(help="measure first-letter absorption on the words of a file, or of the `world`")
    ] = None,
    other: Annotated[str | None, Parameter(help="another dictionary of the same site to compare with")] = None,
    seeds: Annotated[
        list[str] | None, Parameter(help="the same dictionary trained with other seeds", consume_multiple=True)
    ] = None,
    declared_l0: Annotated[
        float | None, Parameter(help="L0 that its makers state, to check the reading [default: that of the file]")
    ] = None,
    random_weights: Annotated[
        int, Parameter(help="train the same recipe for so many tokens on the model with shuffled weights, as a control")
    ] = 0,
    nulls: Annotated[int, Parameter(help="random dictionaries with the same norms")] = 2,
    seed: Annotated[int, Parameter(help="of controls and intervals")] = 0,
    out: Annotated[Path | None, Parameter(group="Output", help="file to save the scores in (.safetensors)")] = None,
) -> Reply:
    """Judge a dictionary on held-out activations: every score with its interval, its null and its controls."""
    given = dict(locals())
    dictionary = opened(file, choice or (), format, options=True)
    beside: dict[str, Any] = {}
    if seeds:
        from cutaway.dictionaries.evaluation.stability import stability

        beside["seeds"] = stability([dictionary, *(opened(s) for s in seeds)], seed=seed)
    with stages() as step:
        if truth is not None:
            scores = _on_truth(dictionary, truth, tokens, nulls, seed, step)
        else:
            from cutaway.cli.dict.job import Job

            loaded = load_model(model)
            given["model"] = pinned(loaded, model)
            job = Job(dictionary, loaded, text, tokens, context, nulls, seed, step)
            if other is not None:
                beside |= job.compared(opened(other), other)
            scores = _scores(job, sequences, random_weights)
            beside |= _beside(job, (features, by), labels, words)
    own = {"file": file, "command": repeated("dict eval", evaluate, given)}
    scores = replace(scores, record=scores.record | own | _declared(dictionary, scores, declared_l0))
    saved = None if out is None else scores.save(out)
    others = {n: b if isinstance(b, list | dict) else as_data(b) for n, b in beside.items()}
    data = {"scores": as_data(scores), **others}

    def show(console: Any) -> None:
        from cutaway.cli.dict.show import show

        show(console, scores, beside, saved)

    return Reply(data, show)


def _scores(job: Job, sequences: int, random_weights: int) -> Scores:
    """The scores of a dictionary on a model, with what is known of how they were measured."""
    from cutaway.dictionaries.evaluation.evaluate import evaluate as judge
    from cutaway.dictionaries.evaluation.scores import joined

    notes: dict[str, Any] = {"documents": job.documents.identity(), "trained on them": job.trained_here(),
                             "fed": job.fed}  # fmt: skip
    others = {n: (d, job.parts[1]) for n, d in job.mlp_neurons().items()}
    if random_weights:
        made, evidence, notes["random weights"] = job.untaught(random_weights)
        others["random weights"] = made, evidence
    job.step("judging …")
    scores = judge(job.dictionary, job.evidence, nulls=job.nulls, others=others, seed=job.seed)
    if sequences:
        try:
            scores = joined([scores, job.loss(sequences)])
        except Refused as refusal:
            notes["loss"] = f"not measured: {refusal.what}: {refusal.why}"
    return replace(scores, record=scores.record | notes)


def _beside(job: Job, features: tuple[int, By], labels: str | None, words: str | None) -> dict[str, Any]:
    """What stands beside the scores: density, latents in context, probes, absorption."""
    from cutaway.cli.dict import labels as lb
    from cutaway.dictionaries.evaluation.evidence import observe
    from cutaway.dictionaries.evaluation.firing import firing

    fired = firing(job.seen, null=[observe(d, job.parts[1]) for d in job.random])
    random = [[float(v) for v in row] for row in fired.density_null]
    decades = [str(n) for n in fired.labels["decade"]]
    found: dict[str, Any] = {"density": {"decades": decades, "latents": fired.density.tolist(), "random": random}}
    if features[0]:
        found["features"] = _features(job, *features)
    if labels is not None:
        from cutaway.dictionaries.evaluation.probing import probing

        job.step("probing …")
        texts, concepts, shown = lb.labelled(labels, job.model)
        evidence = job.texts(texts)
        null = [observe(d, evidence) for d in job.random]
        got = probing(observe(job.dictionary, evidence), shown, random=null, seed=job.seed)
        found["probing"] = replace(got, labels=got.labels | {"concept": concepts})
    if words is not None:
        job.step("first letters …")
        found["first letters"] = _letters(job, lb.words(words, job.model))
    return found


def _letters(job: Job, words: list[str]) -> Scores:
    from cutaway.dictionaries.evaluation.evidence import observe
    from cutaway.dictionaries.evaluation.letters import letter_absorption, letter_evidence

    d = job.dictionary
    if len(d.reads) != 1 or d.reads != d.writes:
        raise Refused("--words", "first letters are probed at one site that is read and written", "leave it out")
    evidence, kept = letter_evidence(job.model, d.reads[0], words, seed=job.seed)
    null = [observe(r, evidence) for r in job.random]
    return letter_absorption(observe(d, evidence), kept, null=null, seed=job.seed)


def _features(job: Job, n: int, by: By) -> list[dict[str, Any]]:
    """The chosen latents, with the contexts in which they are largest."""
    from cutaway.dictionaries.evaluation.evidence import observe
    from cutaway.dictionaries.evaluation.features import context, features

    seen, rows = observe(job.dictionary, job.evidence), []
    found = features(seen, n=n, by=by, seed=job.seed)
    assert job.evidence.context is not None
    texts = job.contexts({int(job.evidence.context[t]) for t in found.token.flatten().tolist() if t >= 0})
    for i, latent in enumerate(found.latent.tolist()):
        shown = []
        for value, token in zip(found.largest[i].tolist(), found.token[i].tolist(), strict=True):
            if token < 0:
                continue
            before, piece, after = context(seen, token, texts=texts).texts(job.model)
            shown.append({"value": value, "before": before, "token": piece, "after": after})
        rows.append({"latent": latent, "focus": float(found.focus[i]), "focus null": found.focus_null[i].tolist(),
                     "frequency": float(found.frequency[i]), "mean active": float(found.mean_active[i]),
                     "contexts": shown})  # fmt: skip
    return rows


def _declared(d: Dictionary, scores: Scores, declared: float | None) -> dict[str, Any]:
    """Whether the L0 that was measured is the one that was declared: the check of a doubtful reading."""
    from cutaway.dictionaries.formats import L0Check

    declared = declared if declared is not None else d.about.get("declared_l0")
    if declared is None:
        return {}
    if declared <= 0:
        raise Refused(f"--declared-l0 {declared:g}", "a dictionary has active latents", "give the L0 that is stated")
    check = L0Check(scores["L0"].value, float(declared))
    return {"declared L0": {"declared": check.declared, "measured": check.measured, "agrees": check.agrees}}


def _on_truth(d: Dictionary, name: str, tokens: int, nulls: int, seed: int, step: Callable[[str], None]) -> Scores:
    from cutaway.cli.dict.job import HELD_OUT
    from cutaway.dictionaries.benchmarks import synthetic
    from cutaway.dictionaries.evaluation.evaluate import evaluate as judge
    from cutaway.dictionaries.evaluation.evidence import Evidence

    stream = d.about.get("stream")
    if (isinstance(stream, dict) and "model" in stream) or "parts" in d.about:
        why = f"the dictionary was trained on a model's activations ({', '.join(d.reads)}), not on this truth"
        raise Refused(f"--truth {name}", why, "leave --truth out, or give a dictionary that was trained on it")
    step(f"making the truth {name} …")
    made = synthetic(name)
    if [d.width(s) for s in (*d.reads, *d.writes)] != [made.directions.shape[1]] * 2:
        own = ", ".join(f"{s}: {d.width(s)}" for s in dict.fromkeys((*d.reads, *d.writes)))
        why = f"its activations are {made.directions.shape[1]} wide, and the dictionary is of {own}"
        raise Refused(f"--truth {name}", why, "give a dictionary that was trained on it")
    step("judging …")
    scores = judge(d, Evidence.gather(made.batches(4096, seed=HELD_OUT), tokens), truth=made, nulls=nulls, seed=seed)
    note = {} if stream else {"trained on": f"the file does not say whether it was {name}"}
    return replace(scores, record=scores.record | note)
