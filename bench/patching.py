"""What TransformerLens' patching helpers cost through the façade, in plain forwards, beside their own.

GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, prompts of 15 tokens, one thread. Each call is the
helper named, on a model loaded by `HookedTransformer.from_pretrained_no_processing`, with the clean cache and a metric
that is a function of the logits [prompt position token] of one cell. In pairs of prompts that differ throughout, every
cell changes something; in pairs that agree in their first ten tokens, as in a name swapped late, most do not. A plain
forward is transformers' own, of the same prompts, measured beside it in the same process. All subjects return the same
numbers. TransformerLens runs one forward a cell whatever the cell is, so of the larger works it does one cell in four.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from bench.beside import started
from bench.frame import finish, options, ratios, serve, summary
from bench.sweepers import quietly

ANSWER, FOIL, LENGTH, CLOSE, LEAST = 7, 9, 15, 1e-3, 2.0
AXES = {"resid_pre": ("layer", "pos"), "mlp_out": ("layer", "pos"), "attn_head_out_all_pos": ("layer", "head"),
        "attn_head_q_all_pos": ("layer", "head"), "attn_head_pattern_all_pos": ("layer", "head_index")}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A call of a helper: prompts, how many first tokens each pair shares, and the metric's name.

    The peer does one cell in `each`.
    """

    helper: str
    prompts: int = 1
    shared: int = 0
    metric: str = "last"
    each: int = 4

    @property
    def words(self) -> str:
        """The work in words."""
        pairs = f"{self.prompts} pair{'s' * (self.prompts > 1)} of prompts"
        where = "differing throughout" if not self.shared else f"agreeing in their first {self.shared} tokens"
        read = "the last position" if self.metric == "last" else "all positions"
        return f"get_act_patch_{self.helper}, {pairs} {where}, a metric of {read}"


WORKS = {f"{n}": work for n, work in enumerate((
    Work("resid_pre"), Work("mlp_out"), Work("attn_head_out_all_pos"), Work("attn_head_q_all_pos"),
    Work("attn_head_pattern_all_pos"), Work("resid_pre", metric="all"), Work("attn_head_out_all_pos", metric="all"),
    Work("attn_head_out_all_pos", prompts=4, each=12), Work("resid_pre", prompts=4, shared=10, each=12),
    Work("attn_head_out_all_pos", prompts=4, shared=10, each=12),
))}  # fmt: skip


def main() -> int:
    """Measure both subjects in rounds that take turns, and write the rows."""
    chosen = options(__doc__, rounds=3).parse_args()
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with started("bench.patching", chosen, "b") as (_, running):
        for n in range(chosen.rounds):
            for work in WORKS:
                values = {}
                for name, subject in running.items():
                    done = subject.ask(work=work, first=n)
                    pairs.setdefault((work, name), []).append(tuple(done["ratio"]))
                    values[name] = done["values"]
                    print(f"round {n + 1}: {WORKS[work].words} by {name}: {done['ratio'][0]:.4g}", file=sys.stderr)
                check(WORKS[work], **values)
        release = {name: subject.about["version"] for name, subject in running.items()}
    rows = []
    for key, work in WORKS.items():
        row = summary(work.words, pairs[key, "cutaway"], "× plain forward")
        if "transformer_lens" in release:
            theirs = summary(work.words, pairs[key, "transformer_lens"], row.unit).value
            peer = f"transformer-lens {release['transformer_lens']}, one cell in {work.each}"
            row = row.against(peer, theirs, LEAST)
        rows.append(row)
    return finish("patching", rows, write=not chosen.no_write, label=chosen.label)


def check(work: Work, cutaway: list[float], transformer_lens: list[float] | None = None) -> None:
    """Stop where the peer returns other numbers for its cells."""
    theirs = transformer_lens or []
    far = max((abs(a - b) for a, b in zip(cutaway[:: work.each], theirs, strict=bool(theirs))), default=0.0)
    if far > CLOSE:
        raise SystemExit(f"{work.words}: numbers differ by up to {far:.2g}")


def prompts(work: Work, vocabulary: int) -> Any:
    """The clean and the corrupt prompts [2 prompt position]."""
    import torch

    ids = torch.randint(vocabulary - 1, (2, work.prompts, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[1, :, : work.shared] = ids[0, :, : work.shared]
    return ids


def last(logits: Any) -> Any:
    """The mean logit difference at the last position."""
    final = logits[:, -1, :]
    return (final[:, ANSWER] - final[:, FOIL]).mean()


def everywhere(logits: Any) -> Any:
    """The mean logit difference of all positions."""
    return (logits[:, :, ANSWER] - logits[:, :, FOIL]).mean()


def job(model: Any, patching: Any, work: Work, each: int) -> Callable[[], Any]:
    """The call: every cell, or one in `each`, in which case the clean run is left out."""
    import torch

    clean, corrupt = prompts(work, model.cfg.d_vocab)
    helper = getattr(patching, f"get_act_patch_{work.helper}")
    sizes = {"layer": model.cfg.n_layers, "pos": LENGTH}
    names = AXES[work.helper]
    cells = patching.make_df_from_ranges([sizes.get(axis, model.cfg.n_heads) for axis in names], names)
    some = cells.iloc[::each].reset_index(drop=True)
    metric = last if work.metric == "last" else everywhere
    before = None if each == 1 else model.run_with_cache(clean)[1]

    @torch.no_grad()
    def run() -> Any:
        cache = before or model.run_with_cache(clean)[1]
        how = {} if each == 1 else {"index_axis_names": None, "index_df": some}
        return quietly(helper, model, corrupt, cache, metric, **how).flatten()

    return run


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    hf = GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)
    if name == "cutaway":
        from cutaway.compat.transformer_lens import HookedTransformer, patching

        model: Any = HookedTransformer.from_pretrained_no_processing(folder)
    else:
        from transformer_lens import patching

        from bench.sweepers import hooked

        model = hooked(hf)

    def answer(work: str, first: int) -> dict[str, Any]:
        w, values = WORKS[work], list[float]()
        each = 1 if name == "cutaway" else w.each
        run, (clean, _) = job(model, patching, w, each), prompts(w, hf.config.vocab_size)

        @torch.no_grad()
        def plain() -> None:
            for _ in range(3):
                hf(clean, use_cache=False)

        ((cpu, wall),) = ratios(plain, {work: lambda: values.__setitem__(slice(None), run().tolist())}, 1, first)[work]
        return {"ratio": (3 * each * cpu, 3 * each * wall), "values": values}

    serve({"version": version("cutaway" if name == "cutaway" else "transformer-lens")}, answer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    else:
        sys.exit(main())
