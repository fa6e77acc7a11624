"""What the evaluation of a circuit costs, and how often a certificate is given to a circuit that deserves none.

Cost: GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, one pair of 15 tokens, one thread. One
evaluation is the metric under one mask over all 32,491 edges, of which 5 % are kept, with the corrupt run that the
other edges read; a plain forward is transformers' own, measured beside it in the same process.

False certificates: no level may be given to circuits that are none, and no verdict of `circuits.faithfulness` may find
one. 100 random circuits of miniworld, with as many edges between each two sites of each two layers as the first 5, 10
and 20 % by `circuits.eap_ig` of three tasks; 60 circuits found alike for answers that mean nothing (each prompt with
those of another one, or with years dealt out: `suites.absent_circuits.meaningless`), and certified for them; 40
circuits found alike in models of miniworld's shape with random weights. Certificates are without a search, which can
only take levels away. 16 prompts each; circuits are found on other prompts. Verdicts are on the 100 of the latter two.
"""

from __future__ import annotations

from typing import Any

from bench.frame import Row, finish, options, ratios, summary

BAR, LENGTH, KEPT, RATE, PROMPTS = 2.5, 15, 0.05, 0.05, 16
SHARES = (0.05, 0.1, 0.2)


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
    """False certificates of random circuits, answers that mean nothing and random weights, and false verdicts."""
    import cutaway as ca
    from cutaway.suites import absent_circuits as absent

    model, found, verdicts = ca.load("miniworld"), dict[str, list[str]](), list[str]()

    def judged(case: str, i: int) -> str:
        """Return the level of a circuit in a case that has none, and note the verdict."""
        name = f"{case}: {absent.TASKS[i % 3]}"
        of, task = absent.cases()[name](2 * PROMPTS, i)
        curve, certificate = absent.judged(of, task, share=SHARES[i // 3 % 3], samples=2, seed=i)
        verdicts.append(curve.verdict)
        return certificate.level

    found["random circuits"] = [x for i in range(9) for x in _random(model, i, -(-random // 9))][:random]
    found["answers that mean nothing"] = [judged("no meaning", i) for i in range(exchanged)]
    found["random weights"] = [judged("no training", i) for i in range(untrained)]
    rows, every = [], [x for levels in found.values() for x in levels]
    for name, levels in found.items():
        false = sum(level != "none" for level in levels)
        rows.append(Row(f"false certificates of {name}, of {len(levels)}", false, ""))
        print(name, levels, flush=True)
    share = sum(level != "none" for level in every) / max(1, len(every))
    wrong = sum(v.startswith("found") for v in verdicts) / max(1, len(verdicts))
    print(verdicts, flush=True)
    return [
        *rows,
        Row(f"share of false certificates, of {len(every)}", round(share, 4), "", RATE),
        Row(f"share of false verdicts, of {len(verdicts)}", round(wrong, 4), "", RATE),
    ]


def _random(model: Any, i: int, samples: int) -> list[str]:
    """The levels of random circuits like one that was found."""
    import cutaway as ca
    from cutaway.suites.absent_circuits import TASKS

    first, second = ca.tasks.load(TASKS[i % 3], model, n=2 * PROMPTS, seed=i).split(0.5)
    scores = ca.circuits.eap_ig(model, first, audit=0)
    circuit = ca.circuits.open(scores, edges=round(SHARES[i // 3] * len(scores.score)))
    return list(ca.circuits.certify(model, second, circuit, draws=4, steps=0, samples=samples).null_levels)


if __name__ == "__main__":
    raise SystemExit(main())
