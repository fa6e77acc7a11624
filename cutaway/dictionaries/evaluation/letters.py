"""Does a latent for “starts with S” fall silent on some words with S?

The first-letter task, for any model and words.
Chanin et al. 2024 (arXiv:2409.14507), as in SAEBench (arXiv:2503.09532): words are shown with others before them
(“tartan has the first letter: T”), and activations are read at the last token of the word, before the model is asked.
For every letter a logistic probe is fitted on some words; letters whose probe has F1 ≥ 0.6 on the others are judged, on
the others that the probe gets right. See `absorption` for what is measured on them.

A model that cannot spell gives no letters to judge and is refused: small models hardly can.

Control: random dictionaries with the same norms and L0. Cost: one forward per word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.absorption import Absorbed, absorbed, by_concept, own_latents, summary
from cutaway.dictionaries.evaluation.controls import random_dictionaries
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence
from cutaway.dictionaries.evaluation.geometry import decoder_rows
from cutaway.dictionaries.evaluation.scores import Scores, collect, control_generator
from cutaway.interventions.probes import logistic
from cutaway.models.model import Model
from cutaway.tasks.labelled import Words

TEMPLATE = "{word} has the first letter:"
LEAST_F1, LEAST_WORDS = 0.6, 10


def letter_evidence(
    model: Model,
    site: str,
    words: Sequence[str],
    *,
    template: str = TEMPLATE,
    examples: int = 4,
    batch: int = 32,
    seed: int = 0,
) -> tuple[Evidence, list[str]]:
    """Read activations at the last token of each word, shown after some examples; the words come without repetitions.

    Args:
        model: the model that reads the words.
        site: where activations are read.
        words: words of letters a to z.
        template: a line about a word, with `{word}` in it.
        examples: lines about other words, with their answers, before the one in question.
        batch: words a forward.
        seed: of the choice of examples.

    Raises:
        Refused: fewer than 20 such words, a template without `{word}`, or a tokenizer that does not tell places.
    """
    kept = list(dict.fromkeys(w for w in words if w.isalpha() and w.isascii()))
    if len(kept) < 20 or "{word}" not in template:
        why = f"{len(kept)} words of letters a to z" if "{word}" in template else "the template has no {word}"
        raise Refused(f"the first letters of {len(words)} words", why, "give some hundred words, and {word} once")
    g = control_generator(seed)
    shown = []
    for i, word in enumerate(kept):
        others = [kept[(i + 1 + int(k)) % len(kept)] for k in torch.randperm(len(kept) - 1, generator=g)[:examples]]
        lines = [template.format(word=w) + " " + w[0].upper() + "\n" for w in others]
        shown.append(("".join(lines), template.format(word=word)))
    found = []
    for first in range(0, len(kept), batch):
        part = shown[first : first + batch]
        tokens = model.tokens([before + line for before, line in part])
        acts = model.capture(tokens, site, logits=False)[site]
        for row, (before, line) in enumerate(part):
            word = kept[first + row]
            end = len(before) + line.index(word) + len(word)
            column = int(tokens.column(0)[row]) + _token_before(tokens.offsets[row], end, word)
            found.append(acts[row, column].flatten().float().cpu())
    return Evidence({site: torch.stack(found)}), kept


@method(
    answers="Does a latent for “starts with S” fall silent on some words with S?",
    paper="Chanin et al. 2024, arXiv:2409.14507",
    cost="words * F",
    control="random_dictionary",
    rung="observational",
)
def letter_absorption(
    model: Model,
    dictionary: Dictionary,
    evidence: Evidence,
    words: Words,
    /,
    *,
    examples: int = 4,
    samples: int = 2,
    seed: int = 0,
) -> Scores:
    """Measure how far latents of first letters are absorbed by latents of single words.

    The evidence is what random dictionaries are fitted on.

    Args:
        examples: number of other words, with their letters, that are shown before each word.
        samples: number of random dictionaries that make the null.
        seed: seed of random dictionaries, of the examples and of the split of the words.

    Raises:
        Refused: the dictionary does not read and write one site, or the activations tell no letter.
    """
    random = random_dictionaries(dictionary, evidence.parted()[0], samples, seed)
    return letter_scores_on(model, dictionary, words.words, random, examples=examples, seed=seed)


def letter_scores_on(
    model: Model,
    dictionary: Dictionary,
    words: Sequence[str],
    random: Sequence[Dictionary],
    *,
    examples: int = 4,
    seed: int = 0,
) -> Scores:
    """Measure the absorption of first letters on some words, beside these random dictionaries.

    Raises:
        Refused: the dictionary does not read and write one site, or the activations tell no letter.
    """
    if len(dictionary.reads) != 1 or dictionary.reads != dictionary.writes:
        why = "first letters are probed at one site that is read and written"
        raise Refused(f"first letters with {dictionary!r}", why, "leave out the words")
    evidence, kept = letter_evidence(model, dictionary.reads[0], list(words), examples=examples, seed=seed)
    null = [encode_evidence(d, evidence) for d in random]
    return letter_scores(encode_evidence(dictionary, evidence), kept, null=null, seed=seed)


def letter_scores(
    encoded: EncodedEvidence,
    words: Sequence[str],
    *,
    null: Sequence[EncodedEvidence] = (),
    train: float = 0.6,
    seed: int = 0,
) -> Scores:
    """Measure the absorption of first letters by a dictionary that was run on `letter_evidence`.

    Args:
        encoded: the dictionary on the evidence.
        words: the words of the evidence.
        null: random dictionaries on the same evidence.
        train: share of the words that probes and a letter's own latents are found on.
        seed: of the split.

    Raises:
        Refused: another number of words, or no letter that the activations tell.
    """
    if len(words) != len(encoded.evidence):
        raise Refused(
            f"{len(words)} words", f"the evidence has {len(encoded.evidence)}", "give those of letter_evidence"
        )
    order = torch.randperm(len(words), generator=control_generator(seed))
    fit, test = order[: round(train * len(words))], order[round(train * len(words)) :]
    probes = _probes(encoded.evidence.of(encoded.dictionary.writes[0]).cpu(), words, fit, test)
    if not probes:
        why = f"no letter has a probe of F1 ≥ {LEAST_F1} and {LEAST_WORDS} words on both sides"
        raise Refused(f"the first letters of {len(words)} words", why, "use a model that can spell, or more words")
    own = _judged(encoded, words, probes, fit, seed)
    random = [summary(list(_judged(s, words, probes, fit, seed).values()), "letter") for s in null]
    rows = [s.against([r[i] for r in random], {}) for i, s in enumerate(summary(list(own.values()), "letter"))]
    probed = {n: {**v, "probe F1": probes[n][2]} for n, v in by_concept(own).items()}
    record = {
        "letters": probed,
        "words": len(words),
        "interval": "over letters",
        "dictionary": encoded.dictionary.fingerprint(),
    }
    return collect(rows, record)


def _judged(
    encoded: EncodedEvidence, words: Sequence[str], probes: dict[str, Any], fit: Tensor, seed: int
) -> dict[str, Absorbed]:
    x, rows = encoded.evidence.of(encoded.dictionary.writes[0]).cpu(), decoder_rows(encoded.dictionary).cpu()
    code, out = encoded.code, {}
    for letter, (direction, right, _) in probes.items():
        own = own_latents(code.rows(fit), _starts(words, letter)[fit], seed=seed)
        out[letter] = absorbed(code.rows(right), rows, x[right], direction, own)
    return out


def _probes(x: Float[Tensor, "word d"], words: Sequence[str], fit: Tensor, test: Tensor) -> dict[str, Any]:
    """Fit a probe for every letter: its direction, the held-out words it gets right, and its F1."""
    from sklearn.metrics import f1_score

    out = {}
    for letter in sorted({w[0].lower() for w in words}):
        y = _starts(words, letter)
        if min(int(y[fit].sum()), int(y[test].sum())) < LEAST_WORDS or bool(y.all()):
            continue
        probe = logistic(x[fit], y[fit], 0.1)
        said = torch.from_numpy(probe.predict(x[test].double().numpy()))
        f1 = float(f1_score(y[test].numpy(), said.numpy()))
        if f1 >= LEAST_F1:
            weight = torch.from_numpy(probe[-1].coef_[0] / probe[0].scale_).float()
            out[letter] = (weight, test[said & y[test]], f1)
    return out


def _starts(words: Sequence[str], letter: str) -> Bool[Tensor, "word"]:
    return torch.tensor([w[0].lower() == letter for w in words])


def _token_before(offsets: Sequence[Any], end: int, word: str) -> int:
    """Return the index of the token in which a word ends."""
    for i, o in enumerate(offsets):
        if o is not None and o[0] < end <= o[1]:
            return i
    raise Refused(f"the last token of {word!r}", "the tokenizer does not tell where it is", "use a fast tokenizer")
