"""Studies of real models that have tools of their own, and their sections of docs/real.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "tests" / "real" / "results"
DICTIONARY = COMMITTED / "dictionary.json"
FEATURES = COMMITTED / "features.json"
LENSES = COMMITTED / "lenses.json"
SHIFT = COMMITTED / "shift.json"
GRAPHS = COMMITTED / "graphs.json"
CIRCUITS = COMMITTED / "circuits.json"
READINGS = COMMITTED / "readings.json"  # what was read in the latents by hand


def sections() -> str:
    """Return the sections of all studies."""
    return lenses() + dictionary() + features() + shift() + graphs() + circuits()


def lenses() -> str:
    """The section about lenses, which `python -m tools.real_lenses` measures."""
    if not LENSES.is_file():
        return "## Three lenses\n\nNot measured yet: `python -m tools.real_lenses`.\n\n"
    found = json.loads(LENSES.read_text("utf-8"))
    names, swapped, lines = list(found["KL"]), list(found["swap"]), []
    for d, depth in enumerate(found["depth"]):
        apart = [_spread(found["KL"][n], d) for n in names]
        swaps = [f"{_spread(found['swap'][n], d)} (chance {found['swap'][n]['chance'][d]:.2f})" for n in swapped]
        about = [f"{found[n][d]:.2f}" for n in ("error", "same position")]
        lines.append(f"| {depth} | {' | '.join([*apart, *swaps, *about])} |")
    heads = [*(f"KL, {n}" for n in names), *(f"swaps, {n}" for n in swapped), "error", "same position"]
    return f"""## Three lenses

`python -m tools.real_lenses` trains a tuned lens of {found["model"]} on {found["tokens"]:,} tokens and estimates a
Jacobian lens on {found["contexts"]} contexts of {found["context"]}, of the text of the dictionary below.
*KL*: nats from the model's predictions to the lens's, mean over the positions of {found["held out"]} other files, with
intervals over files. *Swaps*: the share of {found["prompts"]} prompts about capitals in which answer and foil change
places when they are swapped in the stream of the last position along the lens's directions (`lenses.swap`), with Wilson
intervals; chance: the most that changes of the same length in random directions swap. *Error*: the standard error of
the Jacobian as a share of its norm; *same position*: the share of it that is the effect on the position itself.
Nearer to the model than the logit lens, intervals apart, at {_nearer(found["KL"], "tuned")} (tuned) and
{_nearer(found["KL"], "Jacobian")} (Jacobian) of {len(found["depth"]) - 1} depths before the last.

| layer | {" | ".join(heads)} |
|{"---|" * (1 + len(heads))}
{chr(10).join(lines)}

{machine_line(found["machine"])}

"""


def _nearer(apart: dict[str, Any], name: str) -> int:
    """The number of depths at which one lens is nearer to the model than the logit lens, beyond both intervals."""
    highs, lows = (end[1] for end in apart[name]["interval"]), (end[0] for end in apart["logit"]["interval"])
    return sum(high < low for high, low in zip(highs, lows, strict=True))


def _spread(found: dict[str, Any], at: int) -> str:
    low, high = found["interval"][at]
    return f"{found['value'][at]:.2f} [{low:.2f}, {high:.2f}]"


def dictionary() -> str:
    """The section about a dictionary, which `python -m tools.real_dictionary` measures."""
    found, readings = (json.loads(file.read_text("utf-8")) for file in (DICTIONARY, READINGS))
    names = {"L0": "active latents a token", "FVU": "share of variance left (FVU)", "dead": "dead on these tokens",
             "dense": "active on a tenth or more", "CE recovered (mean)": "loss recovered, against the mean",
             "ΔCE": "rise of the loss, in nats"}  # fmt: skip
    columns = ("pca", "pca first", "neurons", "random directions")
    lines = []
    for name, says in names.items():
        row, twin = found["scores"][name], found["shuffled"].get(name, {})
        beside = [_several(row[c]) for c in columns] + [_scored(twin), _several(twin.get("pca"))]
        lines.append(f"| {says} | {_scored(row)} | {' | '.join(beside)} |")
    held, text = found["text"]["test"], found["text"]["train"]
    bounds, n = found["ordinary"]["bounds"], len(found["features"])
    minutes = " and ".join(f"{s / 60:.0f}" for s in found["seconds"].values())
    read = {(r["latent"], r["token"]): r["says"] for r in readings["latents"]}
    latents = [(f, read.get((f["latent"], f["contexts"][0]["token"]))) for f in found["features"]]
    summary = f"\n{readings['summary']}\n" if all(says for _, says in latents) else ""
    density = " · ".join(f"{d}: {x:.0f}" for d, x in zip(*found["density"].values(), strict=True) if x)
    return f"""## A dictionary, and what its latents say

`python -m tools.real_dictionary` takes `{found["site"]}` of {found["model"]} on {found["tokens"]:,} tokens of what any
Debian machine with Python has (licences, package documents, the standard library's docstrings; {text["files"]} files),
trains {found["latents"]:,} TopK latents, {found["k"]} a token, in {found["passes"]} passes, and judges them on
{found["held out"]:,} tokens of {held["files"]} other files, which share no paragraph with those. It does the same with
the model whose weights are shuffled, as a control. Minutes by the clock, model and shuffled, on one thread of a machine
that did other work beside it: {minutes}. PCA has as many components a token as the dictionary has latents, the largest
or the first; intervals are 95 % over contexts (of shares of latents, Wilson's).

| | dictionary | PCA, largest | PCA, first | neurons | random directions | shuffled weights | its PCA |
|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

Latents by the share of tokens they fire on: {density}.

{n} latents, a seeded draw of {found["ordinary"]["latents"]:,} that fire on {bounds[0]:.1%} to {bounds[1]:.0%} of the
held-out tokens, where they are largest; *focus* is the share of a latent's activation that falls on one token.

| latent | fires on | focus | where it is largest | read as |
|---|---|---|---|---|
{chr(10).join(_latent(f, says) for f, says in latents)}
{summary}
{machine_line(found["machine"])}
"""


def features() -> str:
    """The section about a store of features, which `python -m tools.real_features` measures."""
    found = json.loads(FEATURES.read_text("utf-8"))
    f1, chance, ruled, counts = (found[n] for n in ("F1", "random features", "ruled", "counts"))
    quantiles = ", ".join(f"{q:.2f}" for q in f1["quantiles"])
    parts = ", ".join(f"{n} {s}" for n, s in found["seconds"].items())
    families = ", ".join(f"“{words} …” {n}" for words, n in found["first words"].items())
    lines = [
        f"| {x['latent']} | {x['tokens']} | {x['F1']:.2f} [{x['interval'][0]:.2f}, {x['interval'][1]:.2f}] "
        f"| {max(x['random']):.2f} | {_plain(x['says'])} |"
        for x in found["drawn"]
    ]
    return f"""## A store of its features, and rules for them

`python -m tools.real_features` trains {found["latents"]:,} TopK latents ({found["k"]} a token) on `{found["site"]}` of
{found["model"]}, {found["trained"]:,} tokens of the same text, and harvests a store on its held-out files:
{counts["counted"]:,} tokens of {counts["documents"]} documents, {found["firing"]:,} latents that fire,
{found["bytes"] / 2**20:.0f} MiB. Seconds by the clock, on a machine that did other work beside it: {parts}.

Rules are found on one half of the documents and scored on the other ([Features](features.md)). Of the first
{ruled["latents"]:,} latents {ruled["with a rule"]} have a rule; {ruled["scored"]} are active on {ruled["from"]}
held-out tokens or more. F1 of these: {_mean(f1, 2)} over latents, quantiles (10, 25, 50, 75, 90 %) {quantiles}.
Of {chance["drawn"]:,} random features of the same densities {chance["with a rule"]} are given a rule; their F1, 0 where
there is none: {_mean(chance, 3)}, largest {chance["largest"]:.2f}. F1 is not 0 by chance: rules that fire as often as
those of the latents, wherever the latents are active, have {_mean(found["by chance"], 3)}. A label stands only where
the low end of F1 is beyond all of these and 0.2. Rules begin with: {families}.

{len(lines)} latents, a seeded draw of those; intervals are 95 % over documents.

| latent | held-out tokens | F1 | random features, at most | rule |
|---|---|---|---|---|
{chr(10).join(lines)}

{machine_line(found["machine"])}

"""


def shift() -> str:
    """The section about SHIFT, which `python -m tools.real_shift` measures."""
    found = json.loads(SHIFT.read_text("utf-8"))
    without = {f"SHIFT, {row['ablated']} latents": row for row in found["site, by the number of latents"].values()}
    rows = {name: row for name, row in found["rows"].items() if name != "SHIFT"} | without
    rows |= {f"errors alone: {name}": row for name, row in found["errors alone"].items()}
    for row in found["reconstruction alone"].values():
        said = f"SHIFT, {row['ablated']} latents" if "ablated" in row else "nothing"
        rows[f"reconstruction alone: {said}"] = row
    lines = [
        f"| {name} | {_share(row['kept'])} | {_share(row['refitted'])} | {row['refitted']['worst']:.2f} "
        f"| {row['refitted']['reading']:.2f} |"
        for name, row in rows.items()
    ]
    held = found["texts"]
    return f"""## Latents of a concept that a probe should not read

`python -m tools.real_shift` asks [`dictionaries.shift`](methods/dictionaries.shift.md) of a dictionary made as the one
above ({found["latents"]:,} TopK latents of `{found["site"]}`, hash {found["dictionary"]}). Texts speak of nurses and
professors, of whom pronouns say that they are women or men. A probe of the profession is fitted on
{held["ambiguous"]} texts, where nurses are women and professors men, and judged on {held["held out"]} others, as many
of each of the four groups. *Kept*: the probe as it was fitted; *refitted*: on the changed texts; *worst*: of the four
groups, refitted; *reading*: the share of the refitted probe that goes with the pronoun. Accuracy with Wilson intervals;
chance: the most that {found["samples"]} sets of as many random latents give.

SHIFT does nothing here, with {_several_numbers(without)}, where LEACE and
deleted words do. It leaves the dictionary's errors as they are, and these carry what the site does: a probe on them
alone reads the pronoun as much, and a balanced one tells the profession of every text. On the reconstruction alone,
without errors, it works with {_enough(found["reconstruction alone"])} latents.

| changed | accuracy, kept | accuracy, refitted | worst | reading |
|---|---|---|---|---|
{chr(10).join(lines)}

{machine_line(found["machine"])}

"""


def _several_numbers(rows: dict[str, Any]) -> str:
    numbers = [str(row["ablated"]) for row in rows.values()]
    return f"{', '.join(numbers[:-1])} or {numbers[-1]} latents ablated"


def _enough(rows: dict[str, Any]) -> str:
    """Say with how many latents the refitted probe is beyond random latents, by its interval."""
    ruled = [row for row in rows.values() if "ablated" in row]
    beyond = [r for r in ruled if r["refitted"]["interval"][0] > r["refitted"]["random latents, at most"]]
    return " or ".join(str(row["ablated"]) for row in beyond)


def _share(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    chance = f" (chance {found['random latents, at most']:.2f})" if "random latents, at most" in found else ""
    return f"{found['accuracy']:.2f} [{low:.2f}, {high:.2f}]{chance}"


def _mean(found: dict[str, Any], digits: int) -> str:
    mean, low, high = (f"{x:.{digits}f}" for x in (found["mean"], *found["interval"]))
    return f"mean {mean} [{low}, {high}]"


def _scored(row: dict[str, Any]) -> str:
    if not row:
        return "–"
    spread = "" if None in row["interval"] else " [{:.3g}, {:.3g}]".format(*row["interval"])
    return f"{row['value']:.3g}{spread}"


def _several(value: Any) -> str:
    held = [x for x in (value if isinstance(value, list) else [value]) if x is not None]
    return " … ".join(dict.fromkeys(f"{x:.3g}" for x in (min(held), max(held)))) if held else "–"


def _latent(feature: dict[str, Any], says: str | None) -> str:
    """A latent's line; a reading stands there only while its contexts are those that were read."""
    places = [[_plain(c[k]) for k in ("before", "token", "after")] for c in feature["contexts"]]
    shown = "<br>".join(f"{before[-45:]} **{token}** {after[:25]}" for before, token, after in places)
    numbers = f"{feature['frequency']:.2%} | {feature['focus']:.2f}"
    return f"| {feature['latent']} | {numbers} | {shown} | {says or 'not read yet'} |"


def _plain(text: str) -> str:
    """Text on one line, without what a table or Markdown would take for its own."""
    words = " ".join(text.replace("\n", "⏎ ").split())
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", words) or "␣"


def _graph_cell(found: dict[str, Any], key: str) -> str:
    spread = found.get(f"{key} interval")
    if spread is not None:
        return f"{found[key]:.2f} [{spread[0]:.2f}, {spread[1]:.2f}]"
    turned = found.get(f"{key}, rotated")
    return f"{found[key]:,.3g}" + (f" ({max(turned):.2f})" if turned else "")


def graphs() -> str:
    """The section about attribution graphs, which `python -m tools.real_graphs` measures."""
    found = json.loads(GRAPHS.read_text("utf-8"))
    fvu = {name: row for name, row in found["FVU"].items() if name.startswith("FVU")}
    low, *_, high = sorted(fvu.values(), key=lambda row: row["value"])
    mean, linear, random = (
        sum(pick(row) for row in fvu.values()) / len(fvu)
        for pick in (lambda r: r["value"], lambda r: r["linear"], lambda r: min(r["random directions"]))
    )
    columns = {
        "nodes": "nodes", "closure": "closure", "size of values": "size of values", "replacement": "replacement score",
        "completeness": "completeness score", "errors": "influence of errors", "left out": "left out",
        "agreement": "graph against removal", "direct agreement": "edges against removal",
        "beyond random vectors": "beyond random vectors",
    }  # fmt: skip
    removed = next(iter(found["graphs"].values()))["removed"]
    lines = [
        f"| {name} | {' | '.join(_graph_cell(g, key) for key in columns)} |" for name, g in found["graphs"].items()
    ]
    largest = "\n".join(
        f"- {name} (“{_plain(g['prompt'])}” {g['answer']} over {g['foil']}): "
        + ", ".join(f"`{n['node']}` {n['influence']:.3g} ({n['random targets']:.3g})" for n in g["largest"])
        for name, g in found["graphs"].items()
    )
    return f"""## Attribution graphs

`python -m tools.real_graphs` trains skip transcoders of all {len(fvu)} MLPs of {found["model"]} at once
({found["latents"]:,} TopK latents each, {found["k"]} a token, {found["tokens"]:,} tokens of the text above, one
`cutaway dict train` of {found["CPU minutes"]:.0f} CPU-minutes), judges them on {found["held out"]:,} tokens of other
files, and traces the first capital and the first IOI sentence of their sets over them, and over the model's own
neurons. Share of variance left: {mean:.2f} on average, {low["value"]:.2f} to {high["value"]:.2f} a layer (the best
linear map of other held-out tokens leaves {linear:.2f}, random directions {random:.2f}); with all MLPs replaced at
once the loss rises by {_scored(found["FVU"]["ΔCE"])} nats. These are small dictionaries of a short training, and errors
carry more than half of what the graph explains.

*Closure*: the largest difference between a value and the sum of its row, beside the size of the values. *Replacement*
and *completeness*: as Ameisen et al. (2025) define them; in brackets with every decoder rotated at random. *Left out*:
the influence of units beyond the budget. *Graph against removal*: rank correlation, over the {removed} units of the
largest influence, of what the graph says along all paths with what the answer loses without the unit, nothing frozen;
*edges against removal*: the same of their direct edges. *Beyond random vectors*: share of these units whose removal
changes the answer by more than that of any random vector as long.

| | {" | ".join(columns.values())} |
|---|{"---|" * len(columns)}
{chr(10).join(lines)}

The largest nodes of those that exceed all random targets (in brackets the largest influence on one of those):

{largest}

{_attention(found["attention"])}

{machine_line(found["machine"])}
"""


def _attention(found: dict[str, Any]) -> str:
    """The text about the heads that carry edges, and about what makes one of them look at the country."""
    carried = "\n".join(
        f"| {name} | {_source(e['edge'], about['words'])} | {e['weight']:+.2f} | "
        + ", ".join(f"{h['head']} {h['loading']:+.2f} ({h['random vectors']:.2f})" for h in e["heads"])
        + " |"
        for name, about in found["edges"].items()
        for e in about["edges"]
    )
    closures = max(about["closure"] for about in found["edges"].values())
    beyond = "; ".join(
        f"{name}: {a['beyond']} of {a['heads that carry']:,} parts ({a['beyond'] / a['heads that carry']:.0%})"
        for name, a in found["edges"].items()
    )
    look, prompts = found["look"], found["look"]["prompts"]
    pairs = "\n".join(
        f"| `{p['query']}` | `{p['key']}` | {p['contrast']:+.3f} [{p['interval'][0]:+.3f}, {p['interval'][1]:+.3f}] | "
        f"{p['lost']:+.3f} | {p['beyond']} |"
        for p in look["pairs"]
    )

    def mean(key: str) -> float:
        return sum(p[key] for p in prompts) / len(prompts)

    return f"""**Which heads carry the largest edges?** `graphs.head_loadings` of the same two prompts over the
transcoders: the edges of the most influence between two positions, all of which end at the difference of logits, and
the heads that pass most of each (in brackets the largest of 19 random vectors as long in the source's place). The heads
sum to each edge within {closures:.1g}. Beyond every random vector (chance 5 %): {beyond}.

| | source | edge | heads |
|---|---|---|---|
{carried}

**What makes head {look["head"]} look at the country?** `graphs.qk` of {len(prompts)} prompts about capitals: the head
gives the country {min(p["p"] for p in prompts):.2f} to {max(p["p"] for p in prompts):.2f} of its attention, with a
score {mean("contrast"):.2f} above the mean of all keys, of which pairs of sources miss
{max(p["closure"] for p in prompts):.1g} at most. The {look["sources"]} largest sources of each side,
{look["sources"] ** 2} pairs, hold {mean("shown"):.2f} of it, and {mean("beyond"):.0%} of them are beyond 19 random
vectors as long (chance 5 %). The largest of the {look["in every prompt"]} pairs that all prompts show: *contrast* is
what a pair does for the country over the other keys, with its interval over prompts; *lost* the attention that goes
without it; *beyond* counts the prompts, of {len(prompts)}, in which it is beyond the random vectors.

| query | key | contrast | lost | beyond |
|---|---|---|---|---|
{pairs}

The look is spread thin over many pairs. Beyond chance in most prompts are two of them, and their query is a constant
that no prompt changes (`bias.mlp_out.0`: the bias of the first MLP's decoder). It meets the country's own embedding,
which draws the look, and what the transcoder of MLP 22 misses at the country, which weakens it."""


def circuits() -> str:
    """The section about circuits, which `python -m tools.real_circuits` measures."""
    if not CIRCUITS.is_file():
        return "\n## Circuits\n\nNot measured yet: `python -m tools.real_circuits`.\n"
    found = json.loads(CIRCUITS.read_text("utf-8"))
    lines = "\n".join(_circuit(name, c, found["tests"]) for name, c in found["circuits"].items())
    return f"""
## Circuits

`python -m tools.real_circuits` finds a circuit of {found["model"]} for two behaviours and judges it
(`suites.discovered`): edges between heads and MLPs are scored by `circuits.eap_ig` on {found["prompts"]} prompts, the
circuit is the smallest of seven sizes whose first edges carry 0.9 of the answer there, and what is said of it below was
measured on {found["prompts"]} prompts of another seed. *Carried*: the share of the answer with all other edges cut, at
their values in the corrupt prompt. *Random circuits* have as many edges between each two sites of each two layers.
*Exchanged answers*: the same circuit, each prompt read at the answer of another one. *Certificate*: how far the answer
moves when other subsets of the rest are cut, as a share of what all edges are worth; a level needs every interval of
its tests to end below 0.2. A needs a search for the worst subset, {_searched(found["steps"])}.

{lines}
{machine_line(found["machine"])}
"""


def _searched(steps: int) -> str:
    return f"here of {steps} steps from 4 starts" if steps else "which was not made, so B is the best there is"


def _circuit(name: str, c: dict[str, Any], tests: list[str]) -> str:
    """The text about one circuit."""
    stable, random = c["stability"], c["random"]
    measured = "; ".join(
        f"{t} {_between(d)} (random circuits from {r:.2f})"
        for t, d, r in zip(tests, c["deviation"], c["random deviation"], strict=True)
    )
    edges = ", ".join(f"`{e['edge']}` {e['score']:+.2f}" for e in c["largest"])
    every = ", ".join(sorted(set(c["random levels"])))
    return f"""**{name}** (“{_plain(c["prompt"])}”; {c["metric"][0]:.1f} logits, {c["metric"][1]:.1f} without edges).
{c["edges"]:,} of {c["all edges"]:,} edges ({c["edges"] / c["all edges"]:.1%}) carry {_between(c["carried"])}; random
circuits {min(random):.2f} to {max(random):.2f}; exchanged answers {_between(c["exchanged"])}. Certificate: level
{c["level"]} (random circuits: {every}; exchanged answers: {c["exchanged level"]}): {measured}. Edges
of the circuit are among the first {stable["share"]:.0%} in {stable["frequency"]:.0%} of resampled prompts, and
{stable["always"]:.0%} of them in all; of the circuit's edges the other prompts' own first {c["edges"]:,} hold
{stable["found again"]:.0%} (chance {stable["by chance"]:.1%}). Rank correlation of
scores with measured ones: {_between(c["agreement"])}. {c["CPU minutes"]:.0f} CPU-minutes. The largest edges between
components: {edges}.
"""


def _between(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['value']:.2f} [{low:.2f}, {high:.2f}]"


def _source(edge: str, words: list[str]) -> str:
    """The source of an edge, with the word that it stands at."""
    source = edge.partition("→")[0]
    return f"`{source}` “{words[int(source.partition('@')[2])].strip()}”"


def machine_line(about: dict[str, Any]) -> str:
    """The machine that something was measured on, in a line."""
    return " · ".join(f"{key} {value}" for key, value in about.items())
