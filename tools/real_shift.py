"""A probe on a real model, and the latents of a concept that it should not read: `python -m tools.real_shift`.

It trains the dictionary of `tools.real_features`, or takes the file of one, and asks `dictionaries.shift` about texts
that are written here: nurses and professors, of whom pronouns say that they are women or men. A probe of the
profession is fitted on texts where both are one. The same is asked of the dictionary's errors alone and of its
reconstruction alone; all is published in docs/real.md.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import cutaway as ca
from bench.frame import machine
from cutaway.dictionaries.evaluation.geometry import decoder_rows
from cutaway.dictionaries.evaluation.shift import PROBES, ROWS, Means, Shift, means, shift_of, without
from cutaway.dictionaries.transforms import fold
from cutaway.tasks.labelled import Labelled
from tools import real, real_features, real_studies
from tools.real_dictionary import MODEL, SITE
from tools.real_lenses import rounded

INTENDED, UNINTENDED, EACH = "nurse", "woman", 60
WORDS = ("she", "her", "hers", "herself", "he", "his", "him", "himself")
PRONOUNS = {
    "woman": {"S": "She", "s": "she", "p": "her", "P": "Her"},
    "man": {"S": "He", "s": "he", "p": "his", "P": "His"},
}
WORK = {
    "professor": ("teaches history", "gives lectures", "marks essays", "runs a seminar", "writes papers",
                  "reviews theses", "holds a chair", "teaches algebra", "does research", "supervises students"),
    "nurse": ("dresses wounds", "gives injections", "works night shifts", "takes blood samples", "checks pulses",
              "works on a ward", "cares for patients", "helps surgeons", "hands out pills", "assists at births"),
}  # fmt: skip
BEFORE = ("{S} is forty and lives in a small town, where {s}", "As {p} neighbours know, {s}",
          "{S} has two brothers; {s}", "{P} day is long, for {s}")  # fmt: skip
BEHIND = ("In the evening {s} likes to cook, and {p} garden is full of herbs.",
          "{S} lives with {p} two cats, and {s} cycles everywhere.", "At weekends {s} visits {p} parents.",
          "{S} plays the cello, as {s} did at school.")  # fmt: skip
NUMBERS, SAMPLES = (5, 20, 100, 300), 20


def main() -> None:
    """Train, ask, keep the numbers, and write the page."""
    parser = real.options(__doc__)
    parser.add_argument("--dictionary", type=Path, help="a file that the recipe has trained before")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), chosen.folder / MODEL, chosen.dictionary)
    real.publish(found, real_studies.SHIFT, write=not chosen.no_write)


def measured(folder: Path, path: Path, dictionary: Path | None) -> dict[str, Any]:
    """Ask of the site, of its errors alone, and of what the latents write of it."""
    model = ca.load(path)
    loaded = ca.dictionaries.load(dictionary or real_features.trained(folder, path))
    folded, labelled = fold(loaded), texts(folder / "texts.jsonl", model)
    rows = decoder_rows(folded, SITE).cpu()
    plain = means(model, folded, labelled.texts)
    bare = means(model, folded, [without(t, WORDS) for t in labelled.texts])
    written = Means(plain.latents @ rows, plain.latents), Means(bare.latents @ rows, bare.latents)
    errors = Means(plain.site - written[0].site, plain.latents), Means(bare.site - written[1].site, bare.latents)

    def asked(some: tuple[Means, Means], most: int) -> Shift:
        y, z = (labelled.shown[:, labelled.concepts.index(c)] for c in (INTENDED, UNINTENDED))
        return shift_of(some[0], some[1], rows, y, z, most=most, samples=SAMPLES)

    whole = {n: asked((plain, bare), n) for n in NUMBERS}
    usual = whole[20]
    return {
        "model": real.MODELS[MODEL], "site": SITE, "latents": real_features.LATENTS, "k": real_features.K,
        "trained": real_features.TRAINED, "dictionary": loaded.fingerprint(), "texts": usual.record["texts"],
        "samples": SAMPLES,
        "rows": {row: told(usual, row) for row in ROWS},
        "site, by the number of latents": {n: told(one, "SHIFT") for n, one in whole.items()},
        "errors alone": {row: told(asked(errors, 20), row) for row in ("nothing", "balanced")},
        "reconstruction alone": {"nothing": told(asked(written, 20), "nothing"),
                                 **{n: told(asked(written, n), "SHIFT") for n in NUMBERS}},
        "machine": machine(),
    }  # fmt: skip


def told(found: Shift, row: str) -> dict[str, Any]:
    """The numbers of one row, for both probes."""
    i = ROWS.index(row)
    chance = found.accuracy_null[i].amax(-1) if row == "SHIFT" else None
    return {
        probe: {"accuracy": rounded(found.accuracy[i, k]), "interval": rounded(found.accuracy_interval[i, k]),
                "worst": rounded(found.worst[i, k]), "worst interval": rounded(found.worst_interval[i, k]),
                "reading": rounded(found.reading[i, k])}
        | ({} if chance is None else {"random latents, at most": rounded(chance[k])})
        for k, probe in enumerate(PROBES)
    } | ({"ablated": len(found.effect)} if row == "SHIFT" else {})  # fmt: skip


def texts(path: Path, model: ca.Model) -> Labelled:
    """Write the texts, as many of each profession and pronoun, and read them."""
    g, rows = random.Random(0), list[dict[str, Any]]()
    for job, who in itertools.product(WORK, PRONOUNS):
        for work, before, behind in g.sample(list(itertools.product(WORK[job], BEFORE, BEHIND)), EACH):
            labels = [name for name in (job, who) if name in (INTENDED, UNINTENDED)]
            rows.append({"text": f"{before} {work}. {behind}".format(**PRONOUNS[who]), "label": labels})
    g.shuffle(rows)
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return ca.tasks.read_labelled(path, model)


if __name__ == "__main__":
    main()
