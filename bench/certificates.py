"""What the evaluation of a circuit costs, and how often a certificate is given to a circuit that deserves none.

Cost: GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, one pair of 15 tokens, one thread. One
evaluation is the metric under one mask over all 32,491 edges, of which 5 % are kept, with the corrupt run that the
other edges read; a plain forward is transformers' own, measured beside it in the same process.

False certificates: no level may be given to circuits that are none. 100 random circuits of miniworld, with as many
edges between each two sites of each two layers as the first 5, 10 and 20 % by `circuits.eap` of three tasks; 60
circuits found by `circuits.eap` for exchanged answers (every prompt with the answer of another), and certified for
them; 40 circuits found alike in models of miniworld's shape with random weights. Certificates are without a search,
which can only take levels away. 16 prompts each; circuits are found on other prompts. Exchanged answers of
`greater_than` are later years still, so they are no null: what they earn stands in a row of its own, uncounted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.frame import Row, finish, options, ratios, summary

BAR, LENGTH, KEPT, RATE, PROMPTS = 2.5, 15, 0.05, 0.05, 16
SPREAD = 3.0
TASKS, EXCHANGED, SHARES = ("ioi", "facts", "greater_than"), ("ioi", "facts", "city_country"), (0.05, 0.1, 0.2)


def main() -> int:
    """Measure both, and write the rows."""
    import torch

    chosen = options(__doc__, rounds=9, random=100, exchanged=60, untrained=40).parse_args()
    torch.set_num_threads(1)
    rows = [evaluation(chosen.rounds), *certificates(chosen.random, chosen.exchanged, chosen.untrained)]
    return finish("certificates", rows, write=not chosen.no_write, label=chosen.label)


def evaluation(rounds: int) -> Row:
    """Plain forwards that one evaluation of a circuit takes."""
    import torch
    import transformers as tf

    import cutaway as ca
    from cutaway.models.edits.edge_mask import places_written, written
    from cutaway.models.edits.wiring import wiring
    from cutaway.models.sweep.masks import sweep_masks

    torch.manual_seed(0)
    model = ca.load(tf.AutoModelForCausalLM.from_config(tf.GPT2Config()))
    w, places = wiring(model), places_written(wiring(model))
    clean, corrupt = (torch.randint(50_000, (1, LENGTH)) for _ in range(2))
    tokens = model.tokens(clean)
    mask = torch.rand(w.heard.shape) < KEPT

    def one() -> None:
        acts = model.capture(corrupt, places, logits=False)
        alternative = written(model, {str(a): acts[str(a)] for a in places})
        sweep_masks(model, w, tokens, [mask], alternative, lambda logits, _: logits[:, 7] - logits[:, 9])

    def plain() -> None:
        with torch.no_grad():
            model.hf(clean)

    found = ratios(plain, {"one": one}, rounds)
    return summary("one evaluation of a circuit, with its corrupt run", found["one"], "× plain forward", BAR)


def certificates(random: int, exchanged: int, untrained: int) -> list[Row]:
    """False certificates of random circuits, exchanged answers and random weights."""
    import cutaway as ca

    trained, found = ca.load("miniworld"), dict[str, list[str]]()
    found["random circuits"] = [x for i in range(9) for x in _random(trained, i, -(-random // 9))][:random]
    found["exchanged answers"] = [_exchanged(trained, EXCHANGED[i % 3], i) for i in range(exchanged)]
    found["random weights"] = [_found(_untrained(trained, i), TASKS[i % 3], i) for i in range(untrained)]
    rows, every = [], [x for levels in found.values() for x in levels]
    for name, levels in found.items():
        false = sum(level != "none" for level in levels)
        rows.append(Row(f"false certificates of {name}, of {len(levels)}", false, ""))
        print(name, levels, flush=True)
    later = [_exchanged(trained, "greater_than", i) for i in range(exchanged // 6)]
    work = f"certificates for exchanged answers of greater_than, which stay later years, of {len(later)}"
    rows.append(Row(work, sum(level != "none" for level in later), ""))
    share = sum(level != "none" for level in every) / max(1, len(every))
    return [*rows, Row(f"share of false certificates, of {len(every)}", round(share, 4), "", RATE)]


def _random(model: Any, i: int, samples: int) -> list[str]:
    """The levels of random circuits like one that was found."""
    import cutaway as ca

    first, second = _prompts(model, TASKS[i % 3], i)
    return list(_certified(model, second, ca.circuits.eap(model, first, audit=0), SHARES[i // 3], samples).null_levels)


def _exchanged(model: Any, name: str, i: int) -> str:
    """The level of a circuit that was found for the answers of other prompts."""
    first, second = (_others_answers(half, 1 + i) for half in _prompts(model, name, i))
    return _level(model, first, second, i)


def _found(model: Any, name: str, i: int) -> str:
    """The level of a circuit that was found for a task."""
    return _level(model, *_prompts(model, name, i), i)


def _level(model: Any, first: Any, second: Any, i: int) -> str:
    import cutaway as ca

    return _certified(model, second, ca.circuits.eap(model, first, audit=0), SHARES[i // 3 % 3], 1).level


def _certified(model: Any, task: Any, scores: Any, share: float, samples: int) -> Any:
    import cutaway as ca

    circuit = ca.circuits.open(scores, edges=round(share * len(scores.score)))
    return ca.circuits.certify(model, task, circuit, draws=4, steps=0, samples=samples)


def _prompts(model: Any, name: str, seed: int) -> tuple[Any, Any]:
    import cutaway as ca

    return ca.tasks.load(name, model, n=2 * PROMPTS, seed=seed).split(0.5)


def _others_answers(task: Any, step: int) -> Any:
    """The prompts with the answers of others."""
    n, pairs = len(task.pairs), []
    for i, p in enumerate(task.pairs):
        other = task.pairs[(i + step) % n]
        pairs.append(replace(p, answer=other.answer, foil=other.foil, answers=other.answers, foils=other.foils))
    return replace(task, pairs=tuple(pairs))


def _untrained(model: Any, seed: int) -> Any:
    """The same model with random weights, large enough that its answers depend on the prompt."""
    import torch

    from cutaway.models.model import Model

    torch.manual_seed(seed)
    hf = type(model.hf)(model.hf.config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.mul_(SPREAD if p.ndim > 1 else 1.0)
    return Model(hf, model.tokenizer, f"untrained-{seed}")


if __name__ == "__main__":
    raise SystemExit(main())
