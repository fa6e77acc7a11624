"""Refusals in the words of the command line: flags where Python has keywords, commands where it has functions."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from cutaway.core.refuse import Call, Code, Keyword, Refused, Word

#: words that only Python has, and what to type instead; {model} is the model that was asked
CODE = {
    "model.sites()": "cutaway sites --model {model}",
    "self_check(model)": "cutaway check --model {model}",
    "patching.ablate": "cutaway patching ablate",
    "task.narrow(model)": "--task-narrow",
    "task.split()": "the task of a world",
    "from_jsonl(path)": "your own prompts: --task FILE.jsonl",
    "your own prompts through from_jsonl": "your own prompts: --task FILE.jsonl",
    "pairs with subject=": 'lines with "subject" in the file of the task',
    "give reference=…": "choose another --task-metric",
    "load(…, tokenizer=…)": "a folder with a tokenizer",
    "load it with attention='sdpa'": "give --model-attention sdpa",
    "load the model with attention='sdpa' or 'eager'": "give --model-attention sdpa",
    "look at run_last(prompts): ": "",
    "give more tokens, or least=1": "give more --tokens",
    "use model.generate, or no cache": "use no cache",
    "read its modules through model.hf": "read its modules in Python",
    "read the weights through model.hf": "read the weights of its modules in Python",
    ", or use lens.transferred()": "",
    "lens_sites(model)": "the residual stream at every depth",
    'give labels={"address": […]}, a different address for each vector': "make the file again",
    "direction.select(address=…)": "give the file of a direction with one vector",
    "direction.at(…).project_out()": "project the direction out of activations, in Python",
    "model.edited(…)": "make the edit in Python",
    "name one: direction(position, layer)": "name a candidate in Python",
    "ca.models.untied(model)": "a copy with its own unembedding, in Python",
    "fold the dictionary first": "use a dictionary without a norm there",
}


def spelled(refusal: Refused, typed: Sequence[str] = ()) -> Refused:
    """Return the same refusal as the command line says it; `typed` are the words of the command."""
    model = shlex.quote(_after("--model", typed) or "miniworld")

    def word(w: Word) -> str:
        match w:
            case Keyword():
                return flag(w)
            case Call():
                return ", ".join(map(flag, w.keywords()))
            case Code():
                return CODE[w.text].format(model=model)

    return refusal.said(word)


def flag(k: Keyword) -> str:
    """Return a keyword as the flag that a command has for it, with its value."""
    name = "-".join(n.replace("_", "-") for n in (k.of, k.name) if n)
    match k.value:
        case bool():
            return f"--{'' if k.value else 'no-'}{name}"
        case None:
            return f"no --{name}"
        case list() | tuple():
            return f"--{name} {shlex.quote(','.join(map(str, k.value)))}"
    return f"--{name}" if k.value is ... else f"--{name} {shlex.quote(str(k.value))}"


def _after(flag: str, typed: Sequence[str]) -> str | None:
    for n, word in enumerate(typed):
        if word == flag and n + 1 < len(typed):
            return typed[n + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
