"""What causal sweeps cost: patching every place, attribution to every node, and tracing, in plain forwards.

GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, one clean and one corrupt prompt of 15 tokens, one
thread. A sweep patches the residual stream entering each layer at each position, the output of each head at all
positions, or of each head at each position, and returns a logit difference for each; the clean run that gives the
values is part of the work. Attribution estimates the same for every head and for every MLP at every position. The
trace adds 3σ of noise to three subject tokens, ten times, and restores the outputs of three MLPs around each layer, at
each position; its naive count is one whole forward a cell and noise, and the runs without restoring.

Every ratio is to the bare transformers forward of one prompt, measured beside it in the same process. All subjects must
return the same numbers. Where a peer takes minutes, it is measured on the cells named and the rest is counted alike.
The textbook loop runs the clean, the corrupt and the patched prompt again for every cell, and caches everything of the
first two.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.frame import Row, Subject, finish, options, pythons, ratios, serve, summary
from bench.works import DRAWS, POSITIONS, SUBJECT, WORKS

SETTLE = 5
CLOSE = 1e-3  # between the numbers of two subjects: float32 logits of about ±1


@dataclass(frozen=True)
class Peer:
    """How a peer is called, and the environment it lives in."""

    says: str
    environment: str


PEERS = {
    "transformer_lens": Peer("transformer-lens {}", "a"),
    "hooked_transformer": Peer("transformer-lens {}", "b"),
    "nnsight": Peer("nnsight {}, batched invokes", "a"),
    "pyvene": Peer("pyvene {}", "a"),
    "textbook": Peer("textbook loop over transformer-lens {}", "b"),
}


def main() -> int:
    """Measure every subject in rounds that take turns, and write the rows."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--work", choices=[*WORKS], action="append", help="only this work (nothing is written)")
    chosen = parser.parse_args()
    interpreters = pythons(chosen, {name: peer.environment for name, peer in PEERS.items()})
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        rows = compare(folder, interpreters, chosen.rounds, chosen.work or [*WORKS])
    return finish("sweeps", rows, write=not (chosen.no_write or chosen.work), label=chosen.label)


def save(folder: str, **sizes: Any) -> None:
    """Seeded random weights, a tokenizer of numbered words, two prompts and the noises, for every subject alike."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config: Any = GPT2Config(**sizes)
        config.n_ctx = config.n_positions  # as in the published GPT-2; an older peer asks for it
        config.bos_token_id = config.eos_token_id = config.vocab_size - 1
        model = GPT2LMHeadModel(config)
        ids = torch.randint(config.vocab_size - 1, (2, POSITIONS))
        noise = torch.zeros(DRAWS, 1, POSITIONS, config.n_embd)
        sigma = model.transformer.wte(ids[0, list(SUBJECT)]).std()
        noise[:, :, list(SUBJECT)] = 3 * sigma * torch.randn(DRAWS, 1, len(SUBJECT), config.n_embd)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = f"t{config.vocab_size - 1}"
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=last, eos_token=last, pad_token=last).save_pretrained(
        folder
    )
    model.save_pretrained(folder)
    save_file({"ids": ids, "noise": noise.detach()}, Path(folder, "ids.safetensors"))


def compare(folder: str, interpreters: dict[str, str], rounds: int, works: Sequence[str]) -> list[Row]:
    """One row a work and peer."""
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, python in interpreters.items():
            running[name] = Subject(python, "bench.sweeps", "--subject", name, folder)
            stack.callback(running[name].close)
        for n in range(rounds):
            for work in works:
                values: list[float] = []
                for name, subject in running.items():
                    if work in subject.about["cells"]:
                        done = subject.ask(work=work, first=n)
                        values = values or done["values"]
                        check(name, work, values, done["values"], subject.about["cells"][work])
                        print(f"round {n + 1}: {work} by {name}: {done['ratio'][0]:.4g}", file=sys.stderr, flush=True)
                        pairs.setdefault((work, name), []).append(tuple(done["ratio"]))
        about = {name: subject.about for name, subject in running.items()}
    return [row for work in works for row in rows(work, pairs, about)]


def check(name: str, work: str, ours: Sequence[float], theirs: Sequence[float], cells: Sequence[int]) -> None:
    """Stop where a subject returns other numbers for its cells."""
    wanted = [ours[i] for i in range(*cells)]
    far = max((abs(a - b) for a, b in zip(wanted, theirs, strict=True)), default=0.0)
    if far > CLOSE:
        raise SystemExit(f"{name} returns other numbers for {work}: they differ by up to {far:.2g}")


def rows(work: str, pairs: dict[tuple[str, str], list[tuple[float, float]]], about: dict[str, Any]) -> list[Row]:
    """The rows of one work: one a peer, or one alone."""
    w = WORKS[work]
    row = summary(w.words, pairs[work, "cutaway"], w.unit, w.bar)
    found = []
    for name in PEERS:
        if (work, name) in pairs:
            says = PEERS[name].says.format(about[name]["version"]) + about[name]["says"].get(work, "")
            found.append(row.against(says, summary(w.words, pairs[work, name], w.unit).value, w.least.get(name)))
    return found or [row]


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    from bench import sweepers

    release, plain, jobs = sweepers.prepare(name, folder)

    def settled() -> None:
        for _ in range(SETTLE):
            plain()

    def answer(work: str, first: int) -> dict[str, Any]:
        w, job, values = WORKS[work], jobs[work], [0.0]

        def several() -> None:
            for _ in range(w.calls):
                values[:] = job.run().tolist()

        ((cpu, wall),) = ratios(settled, {work: several}, 1, first)[work]
        scale = SETTLE / w.calls / w.per * w.cells / len(range(*job.cells))
        return {"ratio": (cpu * scale, wall * scale), "values": values}

    settled()
    serve(
        {
            "version": release,
            "cells": {work: job.cells for work, job in jobs.items()},
            "says": {work: f" (from {job.says})" for work, job in jobs.items() if job.says},
        },
        answer,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    else:
        sys.exit(main())
