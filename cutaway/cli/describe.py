"""`cutaway features describe`: labels of latents by a language model, with their scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cutaway.cli.features import NAME, STORE
from cutaway.cli.output import OUT_HELP, check_out, save
from cutaway.cli.shell import Reply, as_data, stages

if TYPE_CHECKING:
    from cutaway.features import Descriptions

URL, KEY = "http://localhost:8000/v1", "OPENAI_API_KEY"


def describe(
    store: STORE,
    latents: Annotated[list[int], Parameter(help="numbers of the latents")],
    /,
    *,
    llm: Annotated[str, Parameter(help="name of the language model on the server")],
    url: Annotated[
        str, Parameter(help="OpenAI-compatible server, up to /v1; its key is read from OPENAI_API_KEY")
    ] = URL,
    judge: Annotated[str | None, Parameter(help="the model that judges labels [default: the same]")] = None,
    budget: Annotated[int | None, Parameter(help="requests that may be sent [default: any number]")] = None,
    dry_run: Annotated[bool, Parameter(help="send nothing: count the requests and their tokens", negative="")] = False,
    windows: Annotated[int, Parameter(help="windows with activity, and without, that a label is judged on")] = 10,
    name: NAME = None,
    seed: Annotated[int, Parameter(help="of the windows that are drawn, and the labels beside")] = 0,
    out: Annotated[Path | None, Parameter(group="Output", help=OUT_HELP)] = None,
) -> Reply:
    """Label latents with a language model, score the labels on held-out documents, and write them into the store.

    Answers are kept in the store's folder (answers.sqlite): the same command goes on from there.
    """
    from cutaway.features import Client, FeatureStore
    from cutaway.features import describe as run

    check_out(out)
    found = FeatureStore(store)
    given: dict[str, Any] = {"key": os.environ.get(KEY), "cache": store / "answers.sqlite", "dry": dry_run}
    writer = Client(llm, url, budget=budget, **given)
    other = None if judge is None else Client(judge, url, budget=budget, **given)
    with stages() as step:
        step("asking …")
        made = run(found, latents, writer, judge=other, dictionary=name, windows=windows, seed=seed)
    if out is not None and not dry_run:
        save(made, out)
    return Reply(as_data(made), lambda console: _show(console, made))


def _show(console: Any, found: Descriptions) -> None:
    from rich.text import Text

    requests = found.record["requests"].values()
    sent, tokens = (sum(r[n] for r in requests) for n in ("sent", "tokens"))
    if found.record["dry"]:
        console.print(f"{sent:,} requests at most, about {tokens:,} tokens of prompts; nothing was sent", style="bold")
        return
    console.print(f"{sent:,} requests, {tokens:,} tokens", style="bold")
    measures, rungs = found.labels["measure"], found.labels["sample"]
    for i, label in enumerate(found.labels["latent"]):
        console.print(Text(label), soft_wrap=True)
        for m, measure in enumerate(measures):
            low, high = found.interval[i, m].tolist()
            beside = ", ".join(f"{r} {float(x):.2f}" for r, x in zip(rungs, found.null[i, m], strict=True))
            failed = float(found.failed[i, m])
            more = f"; {failed:.0%} of the answers unreadable" if failed else ""
            line = f"  {measure} {float(found.score[i, m]):.2f} [{low:.2f}, {high:.2f}]"
            console.print(Text(line).append(f"  {beside}{more}", "dim"), soft_wrap=True)
        low, high = found.lead_interval[i].tolist()
        lead = f"  lead over the rule {float(found.lead[i]):+.2f} [{low:+.2f}, {high:+.2f}], q {float(found.q[i]):.2g}"
        console.print(Text(lead), soft_wrap=True)
