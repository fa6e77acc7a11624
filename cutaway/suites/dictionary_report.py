"""A report of one dictionary on held-out text of a model: scores beside controls, latents in context, probes.

    report = DictionaryReport(dictionary, model, tokens=32768)
    report.scores(sequences=32)
    report.features(5)

What controls are fitted on and what is judged on are different text, and neither was trained on where that can be
known. `judge_on_truth` is the same for a dictionary of a synthetic benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cutaway.core.address import parse
from cutaway.core.refuse import Keyword, NoTokens, Refused
from cutaway.dictionaries import training as tr
from cutaway.dictionaries.about import trained_bos
from cutaway.dictionaries.benchmarks import synthetic
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.compare import Comparison, comparison
from cutaway.dictionaries.evaluation.controls import controls, mlp_neurons, neuron_sites, random_dictionaries
from cutaway.dictionaries.evaluation.evaluate import evaluate
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence
from cutaway.dictionaries.evaluation.features import By, context, features_of
from cutaway.dictionaries.evaluation.firing import firing_of
from cutaway.dictionaries.evaluation.letters import letter_scores_on
from cutaway.dictionaries.evaluation.loss import splice_loss, unfitted
from cutaway.dictionaries.evaluation.probing import Probing, probing_on
from cutaway.dictionaries.evaluation.reading import BATCH, HELD_OUT, beginning, gathered, held_out, reading
from cutaway.dictionaries.evaluation.scores import Scores, control_seed, joined
from cutaway.dictionaries.evaluation.splitting import Splitting, splitting_of
from cutaway.dictionaries.formats import L0Check
from cutaway.dictionaries.gates import forms_of
from cutaway.dictionaries.transforms import alone, together
from cutaway.models import shuffled
from cutaway.models.model import Model
from cutaway.streams import LiveStream
from cutaway.tasks.labelled import Labelled, Words

ALIKE, HALF = 0.7, 0.5  # |cosine| of partners that are alike; share of tokens of partners that fire together
NEURONS = 1 << 28  # values of MLP neurons that are held as evidence at most


@dataclass
class DictionaryReport:
    """Judgement of one dictionary on the activations of one model; what several questions need is read once.

    Attributes:
        dictionary: the dictionary judged.
        model: the model that it is of.
        text: file or folder of held-out text; None means the text of the model's own world.
        tokens: tokens judged on.
        context: tokens per context.
        nulls: random dictionaries with the same norms and L0.
        seed: seed of controls and intervals.
        on_stage: called with a few words when something long begins.
        documents: the text.
    """

    dictionary: Dictionary
    model: Model
    text: str | None = None
    tokens: int = 32768
    context: int = 96
    nulls: int = 2
    seed: int = 0
    on_stage: Callable[[str], None] = field(default=lambda stage: None)

    def __post_init__(self) -> None:
        self.documents = held_out(self.model, self.text)
        self._reading = self._stream(self.model, tuple(dict.fromkeys((*self.sites, *self.neurons))))

    @cached_property
    def neurons(self) -> tuple[str, ...]:
        """Sites of the model's own MLP neurons that are a control."""
        found = tuple(neuron_sites(self.model, self.dictionary).values())
        d_mlp = self.model.weights.mlp_out[parse(found[0]).layer or 0].shape[0] if found else 0
        return found if len(found) * d_mlp * self.tokens <= NEURONS else ()

    def _stream(self, model: Model, sites: Sequence[str], batch: int = BATCH) -> LiveStream:
        """Stream activations of the documents from their beginning."""
        return reading(model, self.dictionary, self.documents, sites, self.tokens, self.context, batch)

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Sites that the dictionary reads or writes."""
        return tuple(dict.fromkeys((*self.dictionary.reads, *self.dictionary.writes)))

    @cached_property
    def evidence(self) -> Evidence:
        """Held-out activations of what the dictionary reads and writes, and of MLP neurons."""
        self.on_stage("reading activations …")
        return gathered(self._reading, self.tokens)

    @cached_property
    def parts(self) -> tuple[Evidence, Evidence]:
        """The evidence that controls are fitted on, and the one that is judged on."""
        return self.evidence.parted()

    @cached_property
    def fit_l0(self) -> float:
        """Active latents a token where controls are fitted."""
        return encode_evidence(self.dictionary, self.parts[0]).l0

    @cached_property
    def encoded(self) -> EncodedEvidence:
        """The dictionary on what is judged on."""
        return encode_evidence(self.dictionary, self.parts[1])

    @cached_property
    def random(self) -> list[Dictionary]:
        """Random dictionaries with the same norms and L0."""
        fit = self.parts[0]
        return random_dictionaries(self.dictionary, fit, self.nulls, self.seed, self.fit_l0)

    def mlp_neurons(self) -> dict[str, Dictionary]:
        """Return the model's own neurons as a control, where they are one."""
        made = mlp_neurons(self.model, self.dictionary, self.parts[0], self.fit_l0) if self.neurons else None
        return {} if made is None else {"mlp neurons": made}

    def scores(self, sequences: int = 32, random_weights: int = 0) -> Scores:
        """Return every score beside random dictionaries and controls, with what is known of how they were measured.

        Args:
            sequences: contexts on which the loss is recovered; 0 leaves that out.
            random_weights: tokens to train the same recipe for on the model with shuffled weights, as a control.
        """
        trained = self.dictionary.about.get("stream", {})  # what its file says it was trained on
        notes: dict[str, Any] = {
            "documents": self.documents.identity(),
            "trained on them": isinstance(trained, dict) and trained.get("documents") == self.documents.identity(),
            "fed": self.fed,
        }
        others = {n: (d, self.parts[1]) for n, d in self.mlp_neurons().items()}
        if random_weights:
            made, evidence, notes["random weights"] = self._with_shuffled_weights(random_weights)
            others["random weights"] = made, evidence
        self.on_stage("judging …")
        found = evaluate(self.dictionary, self.evidence, nulls=self.nulls, others=others, seed=self.seed)
        if sequences:
            try:
                found = joined([found, self.loss(sequences)])
            except Refused as refusal:
                notes["loss"] = f"not measured: {refusal.what}: {refusal.why}"
        return replace(found, record=found.record | notes)

    def density(self) -> dict[str, Any]:
        """Count latents by how often they fire, in decades, beside random dictionaries."""
        fired = firing_of(self.encoded, null=[encode_evidence(d, self.parts[1]) for d in self.random])
        random = [[float(v) for v in row] for row in fired.density_null]
        decades = [str(n) for n in fired.labels["decade"]]
        return {"decades": decades, "latents": fired.density.tolist(), "random": random}

    def features(self, n: int, by: By = "focus") -> list[dict[str, Any]]:
        """Choose `n` latents `by` focus, frequency or size, with the contexts in which they are largest."""
        encoded, rows = encode_evidence(self.dictionary, self.evidence), []
        found = features_of(encoded, n=n, by=by, seed=self.seed)
        assert self.evidence.text is not None
        for i, latent in enumerate(found.latent.tolist()):
            shown = []
            for value, token in zip(found.largest[i].tolist(), found.token[i].tolist(), strict=True):
                if token < 0:
                    continue
                before, piece, after = context(encoded, token, texts=self.evidence.text.contexts).texts(self.model)
                shown.append({"value": value, "before": before, "token": piece, "after": after})
            rows.append(
                {
                    "latent": latent,
                    "focus": float(found.focus[i]),
                    "focus null": found.focus_null[i].tolist(),
                    "frequency": float(found.frequency[i]),
                    "mean active": float(found.mean_active[i]),
                    "contexts": shown,
                }
            )
        return rows

    def probing(self, labelled: Labelled) -> Probing:
        """Probe concepts on labelled texts."""
        self.on_stage("probing …")
        return probing_on(self.model, self.dictionary, labelled, self.random, context=self.context, seed=self.seed)

    def first_letters(self, words: Words) -> Scores:
        """Measure how far latents of first letters are absorbed by latents of single words.

        Raises:
            Refused: the dictionary does not read and write one site, or the activations tell no letter.
        """
        self.on_stage("first letters …")
        return letter_scores_on(self.model, self.dictionary, words.words, self.random, seed=self.seed)

    def loss(self, sequences: int) -> Scores:
        """Measure what the model can still do with the dictionary in it, on contexts that no control was fitted on."""
        self.on_stage("recovering the loss …")
        tokens, special = unfitted(*self.parts, sequences)
        beside = controls(self.dictionary, self.parts[0], self.fit_l0) | self.mlp_neurons()
        return splice_loss(self.model, self.dictionary, tokens, special=special, null=self.random, control=beside)

    def _with_shuffled_weights(self, tokens: int) -> tuple[Dictionary, Evidence, str]:
        """Train the same recipe on the model with shuffled weights: a dictionary, its evidence, and how it was made.

        It is judged on the same tokens as the dictionary, and trained on those behind them.
        """
        self.on_stage("training on shuffled weights …")
        recipes, note = self._recipes()
        model = shuffled(self.model, control_seed(self.seed))
        stream = self._stream(model, self.sites, min(BATCH, tokens))
        evidence = Evidence.gather(stream, self.tokens)
        try:
            made = tr.train(stream, recipes, tr.Plan(tokens=tokens))
        except NoTokens:
            why = "all of the text is judged on, and nothing is left to train on"
            raise Refused("training on shuffled weights", why, "give more text, or fewer tokens") from None
        done = made if isinstance(made, list) else [made]
        d = done[0].dictionary if len(done) == 1 else together([t.dictionary for t in done])
        return d, evidence.parted()[1], f"{note}, on {done[0].tokens} tokens behind those judged on"

    def _recipes(self) -> tuple[list[tr.Recipe], str]:
        about = self.dictionary.about
        parts = about.get("parts", [about])
        if all("recipe" in p for p in parts):
            return [replace(tr.recipe_of(p["recipe"]), rate=p.get("rate")) for p in parts], "the same recipe"
        d = self.dictionary
        made = (
            [d] if len(d.blocks) == 1 or len(d.writes) > len(d.blocks) else [alone(d, b) for b in range(len(d.blocks))]
        )
        return [recipe_like(m, self.fit_l0) for m in made], "no recipe in the file: the same sizes and kind of gate"

    def compared(self, other: Dictionary, name: str) -> dict[str, Comparison | Splitting]:
        """Compare with another dictionary: partners, and what the narrower one's latents split into."""
        missing = [s for s in (*other.reads, *other.writes) if s not in self.sites]
        if missing or set(other.writes) != set(self.dictionary.writes):
            own, its = (" → ".join(", ".join(s) for s in (d.reads, d.writes)) for d in (self.dictionary, other))
            why = f"it is of {its}, and the dictionary judged of {own}"
            raise Refused(f"comparison with {name}", why, "compare dictionaries of the same sites")
        self.on_stage("comparing …")
        here, there = self.encoded, encode_evidence(other, self.parts[1])
        narrow, wide = sorted((here, there), key=lambda s: s.dictionary.n_latents)
        return {"comparison": comparison(here, there), "splitting": splitting_of(narrow, wide)}

    @property
    def fed(self) -> str:
        """Beginning of the contexts that it is judged on, and whether that is known of its training."""
        same = trained_bos(self.dictionary.about) == beginning(self.model, self.dictionary)
        known = "as in its training" if same else "its training is not known"
        return f"{self._reading.beginning} ({known})"


def partners(found: Comparison, split: Splitting) -> list[tuple[str, float, list[float]]]:
    """Sum up a comparison: what is counted or averaged, its value, and the same of each draw of the null.

    Partners are alike if the |cosine| of their decoder rows is above 0.7, and fire together if both fire on half of the
    tokens on which either does. A latent has split if it has two or more parts.
    """
    matched = found.partner >= 0
    alive = matched & ~found.overlap.isnan()
    cosine, overlap = found.cosine, found.overlap
    rows = [
        ("mean |cosine| of partners", cosine[matched].mean(), found.cosine_null.nanmean(0)),
        (
            f"partners with |cosine| above {ALIKE}",
            (cosine[matched] > ALIKE).float().mean(),
            (found.cosine_null > ALIKE).float().mean(0),
        ),
        (
            "mean share of tokens on which partners fire together",
            overlap[alive].mean(),
            found.overlap_null.nanmean(0),
        ),
        (
            "partners that fire together on half of their tokens",
            (overlap[alive] > HALF).float().mean(),
            (found.overlap_null > HALF).float().mean(0),
        ),
        ("narrow latents split into two or more", (split.parts >= 2).float().mean(), ()),
        (
            "mean share of a narrow latent's tokens that its parts cover",
            split.covered.nanmean(),
            split.covered_null.nanmean(0),
        ),
    ]
    return [(name, float(value), [float(v) for v in null]) for name, value, null in rows]


def recipe_like(d: Dictionary, l0: float) -> tr.Recipe:
    """Return a recipe for a dictionary of the same blocks, kind of gate and L0."""
    gate = d.gates[0]
    own_form = forms_of(type(gate).__name__).train
    form = forms_of(own_form.retrained_by).train if own_form.retrained_by else own_form
    gating = form.like(gate, max(1, round(l0 / len(d.blocks))))
    own = gating.fixed and all(b.reads == b.writes and len(b.reads) == 1 for b in d.blocks)
    return tr.Recipe(
        d.blocks, gating, gating.customary(), decoder="unit" if own else "free", subtract=own, skip=bool(d.skip)
    )


def judge_on_truth(
    d: Dictionary,
    name: str,
    tokens: int,
    nulls: int = 2,
    seed: int = 0,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Scores:
    """Judge a dictionary on a synthetic benchmark, with recovery and planted absorption.

    Raises:
        Refused: the dictionary was trained on a model, or is of another width.
    """
    stream = d.about.get("stream")
    if (isinstance(stream, dict) and "model" in stream) or "parts" in d.about:
        why = f"the dictionary was trained on a model's activations ({', '.join(d.reads)}), not on this truth"
        raise Refused(f"truth {name}", why, "judge it on its model, or give a dictionary that was trained on it")
    on_stage(f"making the truth {name} …")
    made = synthetic(name)
    if [d.width(s) for s in (*d.reads, *d.writes)] != [made.directions.shape[1]] * 2:
        own = ", ".join(f"{s}: {d.width(s)}" for s in dict.fromkeys((*d.reads, *d.writes)))
        why = f"its activations are {made.directions.shape[1]} wide, and the dictionary is of {own}"
        raise Refused(f"truth {name}", why, "give a dictionary that was trained on it")
    on_stage("judging …")
    evidence = Evidence.gather(made.batches(4096, seed=HELD_OUT), tokens)
    scores = evaluate(d, evidence, truth=made, nulls=nulls, seed=seed)
    note = {} if stream else {"trained on": f"the file does not say whether it was {name}"}
    return replace(scores, record=scores.record | note)


def check_declared_l0(d: Dictionary, scores: Scores, declared: float | None = None) -> dict[str, Any]:
    """Compare the measured L0 with the declared one (that of the file by default): the check of a doubtful reading.

    Returns an entry for the record; empty if none is declared.
    """
    declared = declared if declared is not None else d.about.get("declared_l0")
    if declared is None:
        return {}
    if declared <= 0:
        raise Refused(Keyword("declared_l0", declared), "a dictionary has active latents", "give the L0 that is stated")
    check = L0Check(scores["L0"].value, float(declared))
    return {"declared L0": {"declared": check.declared, "measured": check.measured, "agrees": check.agrees}}
