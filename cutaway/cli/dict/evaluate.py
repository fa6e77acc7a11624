"""`cutaway dict eval`: how good a dictionary is, beside its controls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cutaway.cli.dict.files import CHOICE, FILE, FORMAT, open_dictionary
from cutaway.cli.dict.show import show as show_scores
from cutaway.cli.repeat import pinned, repeated
from cutaway.cli.shell import Reply, as_data, stages
from cutaway.cli.subjects import DEFAULT_MODEL, load_model

if TYPE_CHECKING:
    from cutaway.suites.dictionary_report import DictionaryReport

By = Literal["focus", "frequency", "size"]


def evaluate(
    file: Annotated[str, Parameter(help=f"the dictionary: {FILE}")],
    /,
    *,
    choice: Annotated[list[str] | None, Parameter(help=CHOICE)] = None,
    format: Annotated[str | None, Parameter(help=FORMAT)] = None,
    model: Annotated[str, Parameter(help="zoo name, folder, GGUF file, or Hugging Face id")] = DEFAULT_MODEL,
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
    from cutaway.suites.dictionary_report import DictionaryReport, check_declared_l0, judge_on_truth

    dictionary = open_dictionary(file, choice or (), format, options=True)
    beside: dict[str, Any] = {}
    if seeds:
        from cutaway.dictionaries.evaluation.stability import stability_of

        beside["seeds"] = stability_of([dictionary, *(open_dictionary(s) for s in seeds)], seed=seed)
    with stages() as step:
        if truth is not None:
            scores = judge_on_truth(dictionary, truth, tokens, nulls, seed, step)
        else:
            loaded = load_model(model)
            given["model"] = pinned(loaded, model)
            report = DictionaryReport(dictionary, loaded, text, tokens, context, nulls, seed, step)
            if other is not None:
                beside |= report.compared(open_dictionary(other), other)
            scores = report.scores(sequences, random_weights)
            beside |= _beside(report, (features, by), labels, words)
    own = {"file": file, "command": repeated("dict eval", evaluate, given)}
    scores = replace(scores, record=scores.record | own | check_declared_l0(dictionary, scores, declared_l0))
    saved = None if out is None else scores.save(out)
    others = {n: b if isinstance(b, list | dict) else as_data(b) for n, b in beside.items()}
    data = {"scores": as_data(scores), **others}

    def show(console: Any) -> None:
        show_scores(console, scores, beside, saved)

    return Reply(data, show)


def _beside(
    report: DictionaryReport, features: tuple[int, By], labels: str | None, words: str | None
) -> dict[str, Any]:
    """Measure what is shown beside the scores: density, latents in context, probes, absorption."""
    from cutaway.tasks.labelled import read_labelled, read_words

    found: dict[str, Any] = {"density": report.density()}
    if features[0]:
        found["features"] = report.features(*features)
    if labels is not None:
        found["probing"] = report.probing(read_labelled(labels, report.model))
    if words is not None:
        found["first letters"] = report.first_letters(read_words(words, report.model))
    return found
