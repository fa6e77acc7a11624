"""Evidence read from a model: held-out text, in contexts that begin as those of the dictionary's training did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cutaway.core import repeat as again
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.repeat import Made, called
from cutaway.core.subject import Flag, Subject, register
from cutaway.dictionaries.about import trained_bos
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.evidence import Evidence, Text
from cutaway.models.model import Model
from cutaway.streams import Documents, LiveStream, Packing, documents, from_texts
from cutaway.zoo.miniworld.documents import WorldDocuments

HELD_OUT = 1_000_003  # seed of a world's documents that no training run uses
BATCH = 2048
TOKENS, CONTEXT = 32768, 96


def read_evidence(
    model: Model, dictionary: Dictionary, text: str | None = None, *, tokens: int = TOKENS, context: int = CONTEXT
) -> Evidence:
    """Read activations of what a dictionary reads and writes, on held-out text.

    Args:
        model: the model that the dictionary is of.
        dictionary: the dictionary to be judged.
        text: a file of text, a folder of them, or .jsonl; None means the text of the model's own world.
        tokens: number of tokens.
        context: tokens per context.

    Raises:
        Refused: no text, no tokens in it, or a dictionary of several models.
    """
    sites = tuple(dict.fromkeys((*dictionary.reads, *dictionary.writes)))
    stream = reading(model, dictionary, held_out(model, text), sites, tokens, context)
    found = gathered(stream, tokens)
    sources = {"model": again.made("model", model), "dictionary": again.made("dictionary", dictionary)}
    whole = None if text is None else str(Path(text).absolute())
    python = called(
        "ca.dictionaries.evaluation.read_evidence",
        "model",
        "dictionary",
        *([] if whole is None else [repr(whole)]),
        tokens=tokens,
        context=context,
    )
    flags = {"": whole, "tokens": tokens, "context": context}
    made = Made(python, flags, needs={n: how.python for n, how in sources.items()}, sources=sources)
    return replace(found, made=made.of(found, _look))


def held_out(model: Model, text: str | None) -> Documents:
    """Return the documents of a file or folder, or those of the model's own world that no training run uses.

    Raises:
        Refused: no text, and the model has no world.
    """
    if text is not None:
        return documents(text)
    if model.world is None:
        why = "only models of the zoo have text of their own"
        raise Refused((f"judging on {model.name} without ", Keyword("text")), why, ("give ", Keyword("text", "FILE")))
    return WorldDocuments(model.world, seed=HELD_OUT)


def beginning(model: Model, dictionary: Dictionary) -> str:
    """Return where a beginning-of-text token stands: as in the training, if the dictionary's file says it."""
    policy = trained_bos(dictionary.about)
    has = getattr(model.tokenizer, "bos_token_id", None) is not None
    return policy if policy is not None and (has or policy == "none") else "auto"


def reading(
    model: Model,
    dictionary: Dictionary,
    text: Documents,
    sites: Sequence[str],
    tokens: int,
    context: int,
    batch: int = BATCH,
) -> LiveStream:
    """Stream the activations of documents from their beginning.

    Raises:
        Refused: a dictionary of several models.
    """
    if dictionary.models:
        why = f"its sites name models ({', '.join(dictionary.models)}), and activations are read from one model here"
        raise Refused(f"judging {dictionary!r}", why, "judge it in Python, on evidence of all its sites")
    packing = Packing(context, beginning(model, dictionary))
    return LiveStream(model, text, sites, packing=packing, batch=batch, window=tokens)


def gathered(stream: LiveStream, tokens: int) -> Evidence:
    """Gather evidence from a fresh stream, with its text."""
    found, reader = Evidence.gather(stream, tokens), stream.reader
    assert found.context is not None
    identity = reader.identity()
    text = Text(
        reader.texts(set(found.context.tolist())),
        reader.rule.special,
        reader.packer.pad,
        {n: identity[n] for n in ("model", "documents", "packing")},
    )
    return replace(found, text=text)


def of_texts(model: Model, sites: Sequence[str], texts: Sequence[str], context: int = CONTEXT) -> Evidence:
    """Read activations of some texts, one sequence each; a text of more tokens than a context is read in parts."""
    longest = max(len(ids) for ids in model.tokenizer(list(texts))["input_ids"]) + 2
    packing = Packing(context=min(context, longest), across=False, rows=32)
    stream = LiveStream(
        model, from_texts(list(texts), "labelled texts"), sites, packing=packing, batch=BATCH, window=BATCH
    )
    return Evidence.gather(stream, 1 << 40)


def _look(evidence: Evidence) -> dict[str, Any]:
    return {"activations": [(s, t.data_ptr(), t._version, len(t)) for s, t in evidence.acts.items()]}


def _open(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> Evidence:
    text, tokens, context = flags.values()
    return read_evidence(opened["model"], opened["dictionary"], text, tokens=tokens, context=context)


def _example(opened: Mapping[str, Any]) -> Evidence:
    """Return the activations on a few short sentences."""
    model, dictionary = opened["model"], opened["dictionary"]
    names = ("Mary", "John", "Anna", "Peter", "Tom", "Lucy")
    texts = [f"When {a} and {b} went to the store, {b} gave a book to {a}." for a in names for b in names if a != b]
    sites = tuple(dict.fromkeys((*dictionary.reads, *dictionary.writes)))
    return gathered(reading(model, dictionary, from_texts(texts), sites, 400, 24), 400)


_TEXT = "held-out text: a file, a folder of them, or .jsonl [default: that of the model's world]"
EVIDENCE = register(
    Subject(
        "evidence",
        Evidence,
        (
            Flag("evidence", str | None, None, _TEXT),
            Flag("evidence_tokens", int, TOKENS, "tokens that are judged on"),
            Flag("evidence_context", int, CONTEXT, "tokens per context"),
        ),
        _open,
        _example,
        needs=("model", "dictionary"),
    )
)
