"""What steering adds to the time of generation: a direction added at every new token, beside plain generation.

Llamas with random weights, one thread, greedy, 4 prompts of 12 tokens; the miniworld's shape (6 layers, d 128, 2048
tokens, 24 new ones) and that of SmolLM2-135M (30 layers, d 576, 49152 tokens, 6 new ones). Both calls are
`model.generate`; one has `direction.add()` at the middle layer, or at every layer. They take turns in one process, so
that the ratio is of calls side by side. Shown is the median ratio of process times, and its quartiles.
"""

from __future__ import annotations

import sys
from typing import Any

from bench.frame import Row, finish, options, ratios, summary

MOST = 1.03
#: shapes by name: sizes of the configuration, and the number of new tokens
SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "the miniworld's shape": ({"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 4,
                               "intermediate_size": 512, "vocab_size": 2048}, 24),
    "SmolLM2-135M's shape": ({"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
                              "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152}, 6),
}  # fmt: skip


def main() -> int:
    """Measure every shape with a direction at one layer and at all, and write the rows."""
    chosen = options(__doc__, rounds=15).parse_args()
    rows = [row for name, (sizes, new) in SHAPES.items() for row in measured(name, sizes, new, chosen.rounds)]
    return finish("steering", rows, write=not chosen.no_write, label=chosen.label)


def measured(name: str, sizes: dict[str, int], new: int, rounds: int) -> list[Row]:
    """The rows of one shape."""
    import torch

    import cutaway as ca

    torch.set_num_threads(1)
    model, g = llama(sizes), torch.Generator().manual_seed(0)
    prompts = torch.randint(1, sizes["vocab_size"], (4, 12), generator=g)
    layers, vector = range(model.shape.n_layers), torch.randn(model.shape.d_model, generator=g)
    places = {"one layer": [layers[len(layers) // 2]], "every layer": layers}

    def job(chosen: Any) -> Any:
        direction = ca.directions.direction({f"resid_post.{i}": vector for i in chosen})
        return lambda: model.generate(prompts, new, edits=direction.add(0.1))

    plain = model.generate(prompts, new)
    jobs = {where: job(chosen) for where, chosen in places.items()}
    for where, steered in jobs.items():
        if steered() == plain:
            raise SystemExit(f"a direction at {where} changes nothing")
    found = ratios(lambda: model.generate(prompts, new), jobs, rounds)
    return [
        summary(
            f"steered generation, {where}, {name}", pairs, "× plain generation", MOST if where == "one layer" else None
        )
        for where, pairs in found.items()
    ]


def llama(sizes: dict[str, int]) -> Any:
    """A seeded Llama that no token ends."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import cutaway as ca

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return ca.load(LlamaForCausalLM(config).eval().requires_grad_(False), check=False)


if __name__ == "__main__":
    sys.exit(main())
