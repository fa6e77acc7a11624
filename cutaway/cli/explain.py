"""`cutaway explain`: why the model said what it said, in the terminal, as JSON, and as one HTML file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cutaway.cli.dry_run import DryRunFlag, cost
from cutaway.cli.processes import is_main_process
from cutaway.cli.repeat import pinned, repeated
from cutaway.cli.shell import INTERRUPTED, Reply, as_data, console, speaks, stages
from cutaway.cli.subjects import DEFAULT_MODEL, load_model
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from cutaway.core.graph import Graph
    from cutaway.graphs.validate import GraphValidation
    from cutaway.models.model import Model
    from cutaway.suites.explanation import Explanation
    from cutaway.views.page import Section, Show

#: what is asked of the bundled world when nothing is asked
TELLING = "When Mary and John went to the store, John gave a drink to"
TELLING_CORRUPT = "When Mary and John went to the store, Mary gave a drink to"


def explain(
    prompt: Annotated[str | None, Parameter(help="a sentence; its next word is the question")] = None,
    /,
    *,
    target: Annotated[str | None, Parameter(help="the answer in question [default: the model's own]")] = None,
    foil: Annotated[str | None, Parameter(help="the answer to compare with [default: the counterfactual's]")] = None,
    model: Annotated[str, Parameter(help="zoo name, folder, GGUF file, or Hugging Face id")] = DEFAULT_MODEL,
    corrupt: Annotated[str | None, Parameter(help="the counterfactual sentence [default: proposed]")] = None,
    chat: Annotated[
        str | None, Parameter(help="what a user says; the sentence, if there is one, is how the reply begins")
    ] = None,
    effort: Annotated[
        Literal["quick", "normal", "thorough"] | None, Parameter(help="siblings and samples [default: by model size]")
    ] = None,
    graph: Annotated[
        str | None, Parameter(help="transcoders, or neurons: trace its attribution graph over them")
    ] = None,
    circuit: Annotated[bool, Parameter(negative="", help="find the edges that carry it, judged on others")] = False,
    seed: Annotated[int, Parameter(help="of every random choice")] = 0,
    html: Annotated[Path | None, Parameter(group="Output", help="write the whole report as one HTML file")] = None,
    dry_run: DryRunFlag = False,
    model_dtype: Annotated[str | None, Parameter(help="dtype of the weights, such as bfloat16")] = None,
    model_device: Annotated[str | None, Parameter(help="device, such as cuda:0")] = None,
) -> Reply:
    """Tell why a model goes on with one word and not another.

    Five methods are asked about one sentence: what it predicts, where along depth the answer appears, which components
    write it, and which positions and heads carry it. Every number stands beside its interval and its control.
    """
    from cutaway.suites import explain as suite

    given = dict(locals())
    if prompt is None and chat is None and model != DEFAULT_MODEL:
        why = "without a prompt, a sentence of the bundled world is asked, which only the bundled model knows"
        raise Refused(
            f"explain --model {model}", why, f'give a sentence: cutaway explain "…" --model {shlex.quote(model)}'
        )
    if html is not None:
        _check_writable(html)
    shown = Shown(console() if speaks() else None)
    with stages() as step:
        step("loading the model")
        m = load_model(model, model_dtype, model_device)
        asked, corrupt = _asked(m, prompt, corrupt, chat)
        options: dict[str, Any] = {"target": target, "foil": foil, "corrupt": corrupt, "effort": effort, "seed": seed}
        options |= {"graph": _units(m, graph), "circuit": circuit}
        if dry_run:
            return cost(suite.explain, m, asked, **options, step=step)
        with step.paused():
            shown.begin(m, asked, target)

        def each(found: Explanation) -> None:
            with step.paused():
                shown.more(found)

        try:
            found = suite.explain(m, asked, **options, step=step, each=each)
        except KeyboardInterrupt:
            if shown.latest is None:
                raise
            found = shown.latest
        told = {"model": pinned(m, model)} | ({"prompt": asked, "corrupt": corrupt} if chat is None else {})
        command = repeated("explain", explain, given | told)
        other = None if found.doubt is None else repeated("explain", explain, given | told | found.doubt.instead)
        if html is not None and is_main_process():
            step("writing the report")
            write(found, html, command, other)
    said = {**data(found, command, html), "instead": other}
    code = INTERRUPTED if found is shown.latest and not found.complete else 0
    return Reply(said, lambda console: shown.rest(console, found, command, html, other), code)


def _check_writable(html: Path) -> None:
    folder = html.absolute().parent
    if html.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise Refused(f"--html {html}", "no file can be written there", "name a file in a folder of yours that exists")


def _units(m: Model, named: str | None) -> Any:
    """Return what an attribution graph is traced over: transcoders of a file, neurons, or nothing."""
    if named is None or named == "neurons":
        return named
    from cutaway.dictionaries.opening import open_named

    return open_named({"graph": named}, {"model": m})


def _asked(m: Model, prompt: str | None, corrupt: str | None, said: str | None) -> tuple[str, str | None]:
    """Return the prompt and its counterfactual: sentences, or chats in which a user says what is in question."""
    if said is None:
        telling = TELLING, TELLING_CORRUPT if corrupt is None else corrupt
        return telling if prompt is None else (prompt, corrupt)
    from cutaway.tasks.chat import chat

    reply = [] if prompt is None else [{"role": "assistant", "content": prompt}]
    texts = [None if t is None else chat(m, [{"role": "user", "content": t}, *reply]) for t in (said, corrupt)]
    return str(texts[0]), texts[1]


def data(e: Explanation, command: str, html: Path | None) -> dict[str, Any]:
    """Return everything found, JSON-ready."""
    return {
        "model": e.model,
        "prompt": e.prompt,
        "answer": e.answer,
        "foil": e.foil,
        "corrupt": e.corrupt,
        "corruption": e.corruption,
        "siblings": e.siblings,
        "complete": e.complete,
        "summary": e.summary,
        "doubt": None if e.doubt is None else e.doubt.text,
        "claims": [vars(c) for c in e.claims],
        "verdicts": [vars(v) for v in e.verdicts],
        "results": _all_data(e.results),
        "own": _all_data(e.own),
        "cost": {"forwards": e.spent.forwards, "seconds": round(e.spent.seconds, 3)},
        "command": command,
        "html": None if html is None else str(html),
    }


def _all_data(results: Any) -> dict[str, Any]:
    return {name: as_data(result) for name, result in results.items()}


@dataclass
class Shown:
    """The terminal's view of an explanation: each part once, as soon as its result is there.

    Attributes:
        console: where it is shown at once; None if only the reply shows it.
        latest: the explanation so far.
        parts: the parts that were shown.
    """

    console: Console | None
    latest: Explanation | None = None
    parts: set[str] = field(default_factory=set)

    def begin(self, model: Model, prompt: str, target: str | None) -> None:
        """Show the prompt with its answer, which one forward tells, where a person looks on."""
        if self.console is None or not self.console.is_terminal:
            return
        try:
            answer = target or model.text.predict(prompt, 1)[0].text
        except Refused:
            return  # the work that follows refuses it in better words
        self._show(self.console, "answer", [_answer(prompt, answer.strip() or repr(answer))])

    def more(self, e: Explanation) -> None:
        """Show the parts that are new."""
        self.latest = e
        if self.console is not None:
            for name, part in _parts(e):
                self._show(self.console, name, part)

    def rest(self, console: Console, e: Explanation, command: str, html: Path | None, other: str | None) -> None:
        """Show what was not shown yet, what could not be claimed, and how to repeat it."""
        for name, part in [*_parts(e), ("end", _end(e)), ("again", _again(e, command, html, other))]:
            self._show(console, name, part)

    def _show(self, console: Console, name: str, part: Iterable[Any]) -> None:
        if name not in self.parts:
            self.parts.add(name)
            for line in part:
                console.print(line, soft_wrap=name == "again")


def _answer(prompt: str, answer: str) -> Text:
    """Return the prompt with its answer; of a chat, what each role says, without the template's marks."""
    from rich.text import Text

    from cutaway.models.turns import parts

    said = [(p.role, prompt[p.start : p.end]) for p in parts(prompt) if p.role and not p.name]
    if not said:
        return Text("\n").append(prompt, "bold").append(f" {answer}", "bold green")
    if said[-1][0] != "assistant":
        said.append(("assistant", ""))
    out = Text()
    for role, words in said:
        out.append(f"\n{role}: ", "dim").append(words, "bold")
    return out.append(f" {answer}" if said[-1][1] else answer, "bold green")


def _parts(e: Explanation) -> Iterator[tuple[str, list[Any]]]:
    """Yield the parts of an explanation that can be shown by now: claims, each before the picture of its numbers."""
    from rich.text import Text

    from cutaway.suites.claims import measured
    from cutaway.views.draw.terminal import terminal

    r, claims = e.results, {c.about: c for c in e.claims if c.supported}

    def said(*about: str) -> list[Any]:
        found = (claims[a] for a in about if a in claims)
        return [Text("▸ ").append(c.text).append(f"  ({c.control})", "dim") for c in found]

    yield "answer", [_answer(e.prompt, e.answer)]
    foil = Text("not ").append(e.foil, "red").append(f"; counterfactual: {e.corruption}", "dim")
    yield "contrast", [foil, *([Text(f"▲ {e.doubt.text}", "yellow")] if e.doubt is not None else [])]
    if "heads" not in r:
        return
    over = f"and {e.siblings} of the same form" if e.siblings else "alone: none of the same form was found"
    yield "over", [Text(f"over this sentence {over}, on {e.model}", "dim"), *said("the prediction")]
    estimates = [Text("first-order estimates of all heads:", "dim")] * (measured(r["heads"]) == "exact")
    yield "heads", [*said("the heads"), *estimates, terminal(r["heads"], "recovered")]
    if "resid_pre" in r:
        yield "positions", [*said("the positions"), terminal(r["resid_pre"], "recovered")]
    if "together" in r:
        yield "together", said("the heads together")
    if "depth" in r:
        yield "depth", [*said("the depth"), terminal(r["depth"], "probability")]
    if "writers" in r:
        yield "writers", [*said("the writers"), terminal(r["writers"], "effect", bars=10)]
    if "circuit" in r:
        yield "circuit", [*said("the circuit"), terminal(r["circuit"], edges=10)]
    if (traced := e.own.get("graph")) is not None and (removed := e.own.get("removed")) is not None:
        yield "graph", [Text(f"▸ {_books(traced, removed)}"), terminal(traced, edges=10)]


def _end(e: Explanation) -> Iterator[Any]:
    """Yield what is not claimed, and the known truth."""
    from rich.text import Text

    from cutaway.suites.explanation import UNSUPPORTED

    missing = [c.about for c in e.claims if not c.supported]
    if missing:
        yield Text(f"▹ {UNSUPPORTED}: {', '.join(missing)}", "yellow")
    for v in e.verdicts:
        mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("?", "yellow")}[v.agrees]
        yield Text(f"{mark} {v.text}", style).append(f"  {v.detail}", "dim")
    if not e.complete:
        yield Text("■ Interrupted: what is above was measured, the rest was not", "yellow")


def _again(e: Explanation, command: str, html: Path | None, other: str | None) -> Iterator[Any]:
    """Yield the report and the commands, unbroken to be copied."""
    from rich.text import Text

    yield Text()
    if other is not None and e.doubt is not None and e.doubt.instead:
        yield Text("the contrast you may mean: ", "yellow").append(other, "bold")
    kept = "(opens from disk, offline)" if html is not None else "add --html report.html for every picture and number"
    yield Text("report: ", "dim").append(f"{html or ''} ", "bold").append(kept, "dim")
    yield Text("again:  ", "dim").append(command)


def write(e: Explanation, path: Path, command: str, other: str | None = None) -> None:
    """Write the explanation as one self-contained HTML file."""
    from cutaway.views.page import Badge, Opening, report

    tone: dict[bool | None, Any] = {True: "agrees", False: "disagrees", None: "unknown"}
    badges = [Badge(v.text, tone[v.agrees], v.detail) for v in e.verdicts]
    facts = {
        "model": e.model,
        "counterfactual": e.corrupt,
        "siblings": f"{e.siblings or 'no'} sentences of the same form",
        "forwards": f"{e.spent.forwards:,.0f} prompts through the model",
        "again": command,
    } | ({"the contrast you may mean": other} if other is not None else {})
    opening = Opening(e.prompt, e.answer, e.foil, e.summary, badges, facts)
    report(f"Why “{e.answer}”?", sections(e), path, opening=opening)


Shows = Callable[..., "list[Show]"]


def sections(e: Explanation) -> list[Section]:
    """Return the report's questions, in reading order, as far as they were asked."""
    from cutaway.views.page import Show

    def shows(*wanted: tuple[Any, str, str, str]) -> list[Show]:
        there = [(kept[name], field, text) for kept, name, field, text in wanted if name in kept]
        return [
            Show(result, field, text, {"bars": 16} if result.kind == "direct_attribution" else {})
            for result, field, text in there
            if field in result.tensors()
        ]

    said = {c.about: [f"{c.text} ({c.control})."] for c in e.claims if c.supported}
    asked = [*_reading(e, said, shows), *_exchanging(e, said, shows), *_tracing(e, said, shows)]
    return [section for section in asked if section.shows]


def _reading(e: Explanation, said: dict[str, list[str]], shows: Shows) -> list[Section]:
    """Return the questions that reading activations answers."""
    from cutaway.views.page import Section

    r = e.results
    return [
        Section(
            "What it predicts",
            "Which words come next, and which after the counterfactual?",
            said.get("the prediction", ()),
            shows(
                (r, "predictions", "probability", f"after “{e.prompt}”"),
                (r, "predictions", "after_corrupt", f"the control: after “{e.corrupt}”"),
            ),
        ),
        Section(
            "Where along depth the answer appears",
            "What would the model say if it ended at this depth?",
            said.get("the depth", ()),
            shows(
                (r, "depth", "probability", "the answer at the last position, with interval and control"),
                (r, "depth", "rank", "how many words are ahead of it (median)"),
                (r, "grid", "probability", "the lens at every depth and position of this sentence"),
            ),
        ),
        Section(
            "Which components write it",
            f"What adds to “{e.answer}” over “{e.foil}” at the last position?",
            [*said.get("the writers", ()), *([_closure(r["writers"])] if "writers" in r else [])],
            shows(
                (r, "writers", "effect", "embedding, heads, biases and MLPs, over the siblings"),
                (e.own, "writers", "effect", "the same for this sentence alone"),
                (r, "neurons", "effect", "with every MLP split into its neurons"),
            ),
        ),
    ]


def _exchanging(e: Explanation, said: dict[str, list[str]], shows: Shows) -> list[Section]:
    """Return the questions that exchanging activations answers."""
    from cutaway.suites.claims import measured
    from cutaway.views.page import Section

    r = e.results
    first = ", estimated to first order" if "heads" in r and measured(r["heads"]) == "exact" else ""
    where = "measured where the estimates are largest, and at random"
    return [
        Section(
            "Which positions carry it",
            "Where does the clean run's activation bring the answer back?",
            said.get("the positions", ()),
            shows(
                (r, "resid_pre", "effect", "the residual stream entering each block"),
                (r, "attn_out", "effect", f"what attention adds{first}"),
                (r, "attn_out", "exact", f"what attention adds, {where}"),
                (r, "mlp_out", "effect", f"what the MLP adds{first}"),
                (r, "mlp_out", "exact", f"what the MLP adds, {where}"),
                (e.own, "resid_pre", "effect", "the residual stream, this sentence alone"),
            ),
        ),
        Section(
            "Which heads carry it",
            "Which heads suffice to bring the answer back, and which are needed?",
            said.get("the heads", ()),
            shows(
                (r, "heads", "effect", f"denoise: clean output in the corrupt run (suffices){first}"),
                (r, "heads", "exact", f"denoise, {where}"),
                (r, "heads", "agreement", "how well the estimates agree with what was measured"),
                (r, "heads_noise", "effect", f"noise: corrupt output in the clean run (needed){first}"),
                (r, "heads_noise", "exact", f"noise, {where}"),
            ),
        ),
        Section(
            "The heads together",
            "Do they take the answer away together, more than random heads?",
            said.get("the heads together", ()),
            shows(
                (r, "together", "effect", "all of them exchanged at once"),
                (r, "together", "single", "each of them alone"),
            ),
        ),
    ]


def _tracing(e: Explanation, said: dict[str, list[str]], shows: Shows) -> list[Section]:
    """Return the questions that a circuit and an attribution graph answer."""
    from cutaway.views.page import Section

    traced, removed = e.own.get("graph"), e.own.get("removed")
    return [
        Section(
            "Along which edges",
            "Which edges between heads and MLPs carry it, with all others cut?",
            said.get("the circuit", ()),
            shows(
                (e.results, "circuit", "weight", "its edges between components, each with the sum of their scores"),
                (e.results, "carried", "faithfulness", "what they carry in other sentences, beside random circuits"),
                (e.results, "certificate", "deviation", "how far cutting other subsets moves the answer"),
            ),
        ),
        Section(
            "Along which features",
            f"Through which features, tokens and errors does this sentence lead to “{e.answer}” over “{e.foil}”?",
            [] if traced is None or removed is None else [_books(traced, removed)],
            shows(
                (e.own, "graph", "weight", "the nodes of the largest influence, and their edges"),
                (e.own, "removed", "effect", "what the answer loses without each of the largest units, measured"),
                (e.own, "removed", "predicted", "the same as the graph says"),
            ),
        ),
    ]


def _books(graph: Graph, removed: GraphValidation) -> str:
    """Say how far the graph is to be trusted: closure, what its units leave out, and what removing them shows."""
    closure, turned = graph.record["closure"]["largest residual"], float(removed.replacement_null.max())
    low, high = removed.agreement_interval.tolist()
    return (
        f"The attribution graph of this sentence: each row sums to its value up to {closure:.1e}; replacement score "
        f"{float(removed.replacement):.2f} (rotated decoders: at most {turned:.2f}), errors carry "
        f"{float(removed.error_share):.0%}. Removing its {len(removed.effect)} largest units agrees with it by a rank "
        f"correlation of {float(removed.agreement):.2f} [{low:.2f}, {high:.2f}]."
    ).replace("-", "−")


def _closure(writers: Any) -> str:
    residual, total = writers.residual.abs().max(), writers.total.abs().mean()
    return (
        f"The shares sum to the model's own logit difference up to {float(residual):.1e} "
        f"(mean difference {float(total):.1f} logits); the final norm's scale is frozen at its value in the run."
    )
