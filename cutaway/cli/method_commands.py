"""Commands of methods, one group per room and one command per method, all derived from the method table."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

import cutaway
from cutaway.cli.dry_run import DryRunFlag, cost
from cutaway.cli.output import OUT_HELP, RESULT, check_out, save
from cutaway.cli.shell import Reply, as_data, working
from cutaway.cli.subjects import parameters as flags_of
from cutaway.core.method import Method, Option
from cutaway.core.outcome import Outcome
from cutaway.core.result import Result
from cutaway.core.subject import choose, open_subjects

#: methods that have a command of their own beside the one in their room
SHORT = {"patch": "patching.activation", "trace": "patching.causal_trace"}
#: commands of a room that are no methods: room → name → where it lives, its line in the help
BESIDE = {
    "lenses": {
        "train": ("cutaway.cli.train_lens:train", "Train a tuned lens, an affine translator per layer."),
        "estimate": ("cutaway.cli.train_lens:estimate", "Estimate a Jacobian lens, a mean Jacobian per layer."),
    },
    "graphs": {
        "show": ("cutaway.cli.graphs:show", "Show the main part of a traced graph, as a picture of tokens × layers."),
        "export": ("cutaway.cli.graphs:export", "Write a traced graph as a file of circuit-tracer and Neuronpedia."),
        "group": ("cutaway.cli.graphs:group", "Write the supernodes of a result as a file to edit by hand."),
        "stability": ("cutaway.cli.graphs:stability", "Compare the units that traced graphs of paraphrases keep."),
    },
    "heads": {
        "write_headvis": ("cutaway.cli.headvis:write_headvis", "Write the pages of heads as a HeadVis tree."),
        "read_headvis": ("cutaway.cli.headvis:read_headvis", "Show the metrics of the heads of a HeadVis tree."),
    },
    "features": {
        "harvest": ("cutaway.cli.features:harvest", "Write the store of features of dictionaries, in one pass."),
        "card": ("cutaway.cli.features:card", "Show what a latent of a store does."),
        "explain": ("cutaway.cli.features:explain", "Find short rules for latents, scored on held-out documents."),
        "describe": ("cutaway.cli.describe:describe", "Label latents with a language model, beside controls."),
        "search": ("cutaway.cli.features:search", "Find latents of a store."),
        "compare": ("cutaway.cli.features:compare", "Match the latents of two dictionaries by where they fire."),
        "corpora": ("cutaway.cli.features:corpora", "Find the latents that two corpora differ in."),
        "export": ("cutaway.cli.features:export", "Write a store for Neuronpedia or SAEDashboard."),
        "merge": ("cutaway.cli.features:merge", "Make one store of several, of different documents."),
    },
}


def __getattr__(name: str) -> Any:
    if name in SHORT:
        return command(cutaway.methods()[SHORT[name]])
    if name not in cutaway.METHOD_ROOMS:
        raise AttributeError(name)
    app = App(name=name, group_commands="Methods")
    for row in cutaway.methods().values():
        if row.room == name:
            function = row.name.split(".")[1]
            app.command(
                command(row), name=function, alias=kebab if (kebab := function.replace("_", "-")) != function else None
            )
    for beside, (where, line) in BESIDE.get(name, {}).items():
        app.command(where, name=beside, help=line)
    return app


def command(row: Method) -> Any:
    """Make a method a command: flags for its subjects and options, `--out`, `--resume` and `--dry-run`."""

    takes = row.takes()

    def run(*, out: Path | None = None, resume: Path | None = None, dry_run: bool = False, **given: Any) -> Reply:
        check_out(out, row.results)  # before the work, not after
        with working(f"{row.name} …"):
            subjects = open_subjects([choose(names, given) for names in takes], given)
            with resumable(resume):
                if dry_run:
                    return cost(row.function, *subjects, **given)
                outcome = row.function(*subjects, **given)
        return replies(outcome, out)

    parameters = [*flags_of(takes), *(_parameter(o) for o in row.options)]
    for name, hint, default in (("out", _OUT, None), ("resume", _RESUME, None), ("dry_run", DryRunFlag, False)):
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = f"{row.answers} ({row.paper})\n\n{inspect.getdoc(row.function)}\n\nCost at most {row.cost}."
    return run


@contextmanager
def resumable(folder: Path | None) -> Iterator[None]:
    """Within the block, sweeps are kept in the folder, if there is one."""
    if folder is None:
        yield
        return
    from cutaway.models.sweep.cache import resuming

    with resuming(folder):
        yield


def replies(outcome: Any, out: Path | None = None) -> Reply:
    """Return the answer of a method's command: of several outcomes all, each saved in a file with its number."""
    if not isinstance(outcome, tuple):
        return reply(outcome, out)
    files = [None if out is None else out.with_suffix(f".{i}{out.suffix}") for i in range(1, len(outcome) + 1)]
    parts = [reply(thing, file) for thing, file in zip(outcome, files, strict=True)]

    def show(console: Any) -> None:
        for part in parts:
            part.show(console)

    return Reply([part.data for part in parts], show)


def reply(result: Outcome, out: Path | None = None, field: str | None = None) -> Reply:
    """Return a result, or one field of it, as the answer of a command, saved if asked for."""
    if out is not None:
        save(result, out, field)

    def show(console: Any) -> None:
        from cutaway.cli.show import draw, state

        draw(console, result, field) if isinstance(result, Result) else state(console, result)
        if out is not None:
            from rich.text import Text

            line = Text(f"saved to {out}")
            if out.suffix == RESULT and isinstance(result, Result):
                line.append("; show it again with ").append(shlex.join(["cutaway", "open", str(out)]), "bold")
            console.print(line, soft_wrap=True)

    own = {"kind": type(result).__name__, "record": dict(result.record)}
    return Reply(as_data(result, field) if isinstance(result, Result) else own, show)


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = Literal[option.choices] if option.choices else str if option.several else option.type  # type: ignore[valid-type]
    hint = Annotated[kind | None if option.optional else kind, Parameter(help=option.help)]
    default = ",".join(map(str, option.default)) if option.several and option.default is not None else option.default
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


_RESUME = Annotated[
    Path | None, Parameter(group="Output", help="folder that keeps what is done; the same command goes on from there")
]
_OUT = Annotated[Path | None, Parameter(group="Output", help=OUT_HELP)]
