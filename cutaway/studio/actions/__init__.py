"""Actions: what the page and the tools can ask of a model; one row each, from which its route derives.

This table is light: what an action does is imported by the worker that does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cutaway.studio import circuit_messages as c
from cutaway.studio import feature_messages as f
from cutaway.studio import graph_messages as g
from cutaway.studio import messages as m


@dataclass(frozen=True)
class Action:
    """A row of the table.

    Attributes:
        name: the last part of its route, and its name to the worker.
        request: what it is asked with.
        response: what it answers with.
        where: the function that does it, as `module:function`.
        says: its line in the OpenAPI document.
        job: True if it takes long: it has no route, and runs as a job of its name.
        kept: True if the same question has the same answer, which may be kept.
        aside: True if the jobs' worker does it while no job runs, so that the page's worker stays free.
        patience: seconds after which it is given up.
    """

    name: str
    request: type[m.Request]
    response: type[m.Message]
    where: str
    says: str
    kept: bool = True
    job: bool = False
    aside: bool = False
    patience: float = 120.0

    def function(self) -> Callable[..., Any]:
        """Return the function that does it, given the session and the request."""
        module, _, name = self.where.partition(":")
        return getattr(import_module(f"cutaway.studio.actions.{module}"), name)


ACTIONS: dict[str, Action] = {
    a.name: a
    for a in (
        Action("run", m.Values, m.Shown, "methods:run", "Run a method and show its result."),
        Action(
            "cost",
            m.Values,
            m.Cost,
            "methods:cost",
            "Tell what a call would cost.",
            kept=False,
            aside=True,
            patience=20.0,
        ),
        Action("show", m.ResultOf, m.Shown, "results:show", "Show a result again."),
        Action("difference", m.TwoResults, m.Shown, "results:difference", "Show the first result minus the second."),
        Action("data", m.ResultOf, m.Data, "results:data", "Return a result as data."),
        Action("report", m.ResultOf, m.Page, "results:report", "Return a result as one page of HTML."),
        Action("text", m.ResultOf, m.Lines, "texts:text", "Return a result as a few lines of text."),
        Action("judge", m.Claim, m.Judged, "texts:judge", "Tell if a sentence claims more than a result supports."),
        Action("predict", m.Prompt, m.Predicted, "prompts:predict", "Return a prompt's tokens and the next ones."),
        Action("stores", m.Request, f.Stores, "features:stores", "List the stores of features.", kept=False),
        Action("latents", f.LatentsOf, f.LatentPage, "features:latents", "Return a page of latents.", kept=False),
        Action("find", f.Search, f.Hits, "features:find", "Search among latents.", kept=False),
        Action("feature", f.LatentOf, f.FeaturePage, "features:feature", "Return the page of a latent.", kept=False),
        Action("read", f.ReadText, f.ReadingOf, "features:read", "Read a text by its latents.", kept=False),
        Action("direction", f.LatentOf, f.DirectionOf, "features:saved_direction", "Save a latent as a direction."),
        Action("graphs", m.Request, g.Graphs, "graphs:graphs", "List the graphs.", kept=False),
        Action("graph", g.GraphOf, g.GraphPage, "graphs:graph", "Return a graph, pruned and laid out.", kept=False),
        Action("node", g.NodeOf, g.NodePage, "graphs:node", "Return what is around a node.", kept=False),
        Action("compare_graphs", g.TwoGraphs, g.GraphChange, "graphs:compare_graphs", "Compare graphs.", kept=False),
        Action("keep_groups", g.GroupsOf, g.Kept, "graphs:keep_groups", "Keep groups of units.", kept=False),
        Action("import_graph", g.ForeignGraph, g.Kept, "graphs:import_graph", "Read a graph file.", kept=False),
        Action("export_graph", g.GraphOf, g.GraphFile, "graphs:export_graph", "Write a graph file.", kept=False),
        Action("circuits", m.Request, c.Circuits, "circuits:circuits", "List the scores of edges.", kept=False),
        Action("circuit", c.CircuitOf, c.CircuitPage, "circuits:circuit", "Return a circuit.", kept=False),
        Action("harvest", f.Harvest, m.Shown, "feature_jobs:harvested", "Harvest a store with rules.", job=True),
        Action("causal_card", f.CausalCard, m.Shown, "feature_jobs:causal", "Ablate a latent.", job=True),
        Action("compare_stores", f.ComparedStores, m.Shown, "feature_jobs:compared", "Match latents.", job=True),
        Action("intervene", m.Intervene, m.Intervened, "interventions:intervene", "Change something inside a run."),
        Action("attention", m.Attention, m.Attended, "attention:attention", "Tell where each token of a prompt looks."),
    )
}
