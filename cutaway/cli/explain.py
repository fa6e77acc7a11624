"""`cutaway explain`: why the model said what it said, in the terminal, as JSON, and as one HTML file."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cutaway.cli.processes import is_main_process
from cutaway.cli.repeat import pinned, repeated
from cutaway.cli.shell import Reply, as_data, stages
from cutaway.cli.subjects import DEFAULT_MODEL, load_model
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from rich.console import Console

    from cutaway.suites.explanation import Explanation
    from cutaway.views.page import Section

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
    effort: Annotated[
        Literal["quick", "normal", "thorough"] | None, Parameter(help="siblings and samples [default: by model size]")
    ] = None,
    seed: Annotated[int, Parameter(help="of every random choice")] = 0,
    html: Annotated[Path | None, Parameter(group="Output", help="write the whole report as one HTML file")] = None,
    model_dtype: Annotated[str | None, Parameter(help="dtype of the weights, such as bfloat16")] = None,
    model_device: Annotated[str | None, Parameter(help="device, such as cuda:0")] = None,
) -> Reply:
    """Tell why a model goes on with one word and not another.

    Five methods are asked about one sentence: what it predicts, where along depth the answer appears, which components
    write it, and which positions and heads carry it. Every number stands beside its interval and its control.
    """
    from cutaway.suites import explain as suite

    given = dict(locals())
    if prompt is None and model != DEFAULT_MODEL:
        why = "without a prompt, a sentence of the bundled world is asked, which only the bundled model knows"
        raise Refused(
            f"explain --model {model}", why, f'give a sentence: cutaway explain "…" --model {shlex.quote(model)}'
        )
    folder = html.absolute().parent if html is not None else Path()
    if html is not None and (html.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK)):
        raise Refused(f"--html {html}", "no file can be written there", "name a file in a folder of yours that exists")
    with stages() as step:
        step("loading the model")
        m = load_model(model, model_dtype, model_device)
        asked = TELLING if prompt is None else prompt
        corrupt = TELLING_CORRUPT if prompt is None and corrupt is None else corrupt
        found = suite.explain(m, asked, target=target, foil=foil, corrupt=corrupt, effort=effort, seed=seed, step=step)
        told = {"prompt": asked, "corrupt": corrupt, "model": pinned(m, model)}
        command = repeated("explain", explain, given | told)
        other = None if found.doubt is None else repeated("explain", explain, given | told | found.doubt.instead)
        if html is not None and is_main_process():
            step("writing the report")
            write(found, html, command, other)
    said = {**data(found, command, html), "instead": other}
    return Reply(said, lambda console: show(console, found, command, html, other))


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


def show(console: Console, e: Explanation, command: str, html: Path | None, other: str | None = None) -> None:
    """Print the answer: prompt, summary, and the four rankings behind it."""
    from rich.text import Text

    from cutaway.suites.explanation import UNSUPPORTED
    from cutaway.views.draw.terminal import terminal

    r = e.results
    head = Text().append(e.prompt, "bold").append(f" {e.answer}", "bold green").append(f"   not {e.foil}", "red")
    console.print()
    console.print(head)
    console.print(Text(f"counterfactual: {e.corruption}", "dim"))
    over = f"and {e.siblings} of the same form" if e.siblings else "alone: none of the same form was found"
    console.print(Text(f"over this sentence {over}, on {e.model}", "dim"))
    console.print()
    if e.doubt is not None:
        console.print(Text(f"▲ {e.doubt.text}", "yellow"))
    if other is not None and e.doubt is not None and e.doubt.instead:
        console.print(Text("  the contrast you may mean: ", "yellow").append(other, "bold"), soft_wrap=True)
    for c in (c for c in e.claims if c.supported):
        console.print(Text("▸ ").append(c.text).append(f"  ({c.control})", "dim"))
    missing = [c.about for c in e.claims if not c.supported]
    if missing:
        console.print(Text(f"▹ {UNSUPPORTED}: {', '.join(missing)}", "yellow"))
    for v in e.verdicts:
        mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("?", "yellow")}[v.agrees]
        console.print(Text(f"{mark} {v.text}", style).append(f"  {v.detail}", "dim"))
    console.print()
    console.print(terminal(r["depth"], "probability"))
    console.print(terminal(r["writers"], "effect", bars=10))
    console.print(terminal(r["resid_pre"], "recovered"))
    console.print(terminal(r["heads"], "recovered"))
    console.print()
    kept = "(opens from disk, offline)" if html is not None else "add --html report.html for every picture and number"
    console.print(Text("report: ", "dim").append(f"{html or ''} ", "bold").append(kept, "dim"), soft_wrap=True)
    console.print(Text("again:  ", "dim").append(command), soft_wrap=True)


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


def sections(e: Explanation) -> list[Section]:
    """Return the report's questions, in reading order."""
    from cutaway.views.page import Section, Show

    r, said = e.results, {c.about: [f"{c.text} ({c.control})."] for c in e.claims if c.supported}
    out = [
        Section(
            "What it predicts",
            "Which words come next, and which after the counterfactual?",
            said.get("the prediction", ()),
            [
                Show(r["predictions"], "probability", f"after “{e.prompt}”"),
                Show(r["predictions"], "after_corrupt", f"the control: after “{e.corrupt}”"),
            ],
        ),
        Section(
            "Where along depth the answer appears",
            "What would the model say if it ended at this depth?",
            said.get("the depth", ()),
            [
                Show(r["depth"], "probability", "the answer at the last position, with interval and control"),
                Show(r["depth"], "rank", "how many words are ahead of it (median)"),
                Show(r["grid"], "probability", "the lens at every depth and position of this sentence"),
            ],
        ),
        Section(
            "Which components write it",
            f"What adds to “{e.answer}” over “{e.foil}” at the last position?",
            [*said.get("the writers", ()), _closure(r["writers"])],
            [
                Show(r["writers"], "effect", "embedding, heads, biases and MLPs, over the siblings", {"bars": 16}),
                Show(e.own["writers"], "effect", "the same for this sentence alone", {"bars": 16}),
                Show(r["neurons"], "effect", "with every MLP split into its neurons", {"bars": 16}),
            ],
        ),
        Section(
            "Which positions carry it",
            "Where does the clean run's activation bring the answer back?",
            said.get("the positions", ()),
            [
                Show(r["resid_pre"], "effect", "the residual stream entering each block"),
                Show(r["attn_out"], "effect", "what attention adds"),
                Show(r["mlp_out"], "effect", "what the MLP adds"),
                Show(e.own["resid_pre"], "effect", "the residual stream, this sentence alone"),
            ],
        ),
        Section(
            "Which heads carry it",
            "Which heads suffice to bring the answer back, and which are needed?",
            said.get("the heads", ()),
            [
                Show(r["heads"], "effect", "denoise: clean output in the corrupt run (suffices)"),
                Show(r["heads_noise"], "effect", "noise: corrupt output in the clean run (needed)"),
            ],
        ),
    ]
    if "together" in r:
        together = [
            Show(r["together"], "effect", "all of them exchanged at once"),
            Show(r["together"], "single", "each of them alone"),
        ]
        question = "Do they take the answer away together, more than random heads?"
        out.append(Section("The heads together", question, said.get("the heads together", ()), together))
    return out


def _closure(writers: Any) -> str:
    residual, total = writers.residual.abs().max(), writers.total.abs().mean()
    return (
        f"The shares sum to the model's own logit difference up to {float(residual):.1e} "
        f"(mean difference {float(total):.1f} logits); the final norm's scale is frozen at its value in the run."
    )
