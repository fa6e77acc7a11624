"""What a store of features costs: CPU milliseconds of each latent, and peak memory as tokens grow.

A random transformer of GPT-2's kind (4 layers, d 256, 4000 tokens), a dictionary of 4096 latents on the stream behind
block 1, of which 32 are active on a token (ReLU, or TopK), contexts of 128 given ids, eight at a time, one thread.
cutaway's harvest is `features.harvest` of all latents with its defaults, files included: statistics, largest and random
examples, every code, and which latents fire together. SAEDashboard is `SaeVisRunner.run` for the first 128 latents, its
cost grows with their number: as it comes, with the model run again for each batch of latents, and with its cache of
activations already on disk, as its Neuronpedia runner has it. It makes the data of its page, without writing the page;
direct effects on logits, and correlations, are in it and not in the harvest. Both must count the same active tokens.
Logits and activations have natural sizes, for small ones make SAEDashboard's histograms several times slower.

Memory is what the resident set of a fresh process grows by at its peak during the harvest of the ReLU dictionary,
mapped files included, large blocks handed back at once (`MALLOC_MMAP_THRESHOLD_`). Random tokens are the hardest:
every pair of latents fires together somewhere. What grows are the random examples: each time that tokens double, a
latent reaches about one more octave of activation. That ends at 32 octaves.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import sweeps
from bench.frame import ROOT, Row, Subject, finish, options, pythons, quiet, rename_tokenizer, serve, spent
from bench.growth import AT_ONCE, grown

UNIT = "CPU ms a latent"
LAYERS, WIDTH, VOCABULARY, LENGTH, CONTEXTS, ROWS = 4, 256, 4000, 128, 128, 8
LATENTS, ACTIVE, LAYER = 4096, 32, 1
WORKS = {"relu": "all 4096 latents of a ReLU dictionary", "topk": "all 4096 latents of a TopK dictionary"}
SHOWN = 128  # latents of the peer, whose default batch is 256
PEERS = {"default": ("sae-dashboard {} as it comes", 20.0), "cached": ("sae-dashboard {}, warm cache", 6.0)}
TOKENS = (16384, 65536, 262144)
FLAT = 1.25  # times the memory of the fewest tokens


@dataclass(frozen=True)
class Maker:
    """One tool with its model and dictionary: make the features of some latents, and their counts of active tokens."""

    latents: int
    run: Callable[[], Any]
    counts: Callable[[Any], list[int]]


def main() -> int:
    """Measure every subject in rounds that take turns, then memory, and write the rows."""
    chosen = options(__doc__, rounds=3).parse_args()
    interpreters = pythons(chosen, {"saedashboard": "c"})
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        rows = [*compare(folder, interpreters, chosen.rounds), *memory(folder)]
        return finish("features", rows, write=not chosen.no_write, label=chosen.label)


def save(folder: str) -> None:
    """Seeded random weights whose logits have a natural size, contexts, and the dictionary's tensors, for all alike."""
    import torch
    from safetensors.torch import load_file, save_file

    g = torch.Generator().manual_seed(0)
    sweeps.save(folder, n_layer=LAYERS, n_embd=WIDTH, n_head=8, n_positions=LENGTH, vocab_size=VOCABULARY)
    rename_tokenizer(folder)
    weights = load_file(Path(folder, "model.safetensors"))
    weights["transformer.wte.weight"] *= 50
    save_file(weights, Path(folder, "model.safetensors"), {"format": "pt"})
    rows = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH, generator=g), dim=1)
    ids = torch.randint(VOCABULARY - 1, (max(TOKENS) // LENGTH, LENGTH), generator=g)
    save_file({"ids": ids, "rows": rows}, Path(folder, "given.safetensors"))


def given(folder: str) -> tuple[Any, Any, float]:
    """Contexts, decoder rows, and the threshold above which about 32 latents are active on a token."""
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    tensors = load_file(Path(folder, "given.safetensors"))
    ids, rows = tensors["ids"], tensors["rows"]
    with torch.no_grad():
        hf = GPT2LMHeadModel.from_pretrained(folder).eval()
        x = hf(ids[:ROWS], output_hidden_states=True).hidden_states[LAYER + 1].flatten(0, 1)
    values = (x @ rows.T).flatten().sort().values
    return ids, rows, float(values[int(len(values) * (1 - ACTIVE / LATENTS))])


# --- time


def compare(folder: str, interpreters: dict[str, str], rounds: int) -> list[Row]:
    """One row a dictionary and peer."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, python in interpreters.items():
            running[name] = Subject(python, "bench.features", "--subject", name, folder)
            stack.callback(running[name].close)
        for n in range(rounds):
            for work in WORKS:
                counts: list[int] = []
                for name, subject in running.items():
                    for way in ("cutaway",) if name == "cutaway" else PEERS:
                        done = subject.ask(work=work, way=way)
                        counts = counts or done["counts"]
                        if done["counts"] != counts:
                            raise SystemExit(f"{name} counts other active tokens of {work} than cutaway")
                        found.setdefault((work, way), []).append((done["cpu"], done["wall"]))
                        print(f"round {n + 1}: {work}, {way}: {done['cpu']:.2f} ms", file=sys.stderr, flush=True)
        release = running["saedashboard"].about["version"] if "saedashboard" in running else ""
    return [row for work in WORKS for row in rows(work, found, release)]


def rows(work: str, found: dict[tuple[str, str], list[tuple[float, float]]], release: str) -> list[Row]:
    """The rows of one dictionary: one for each way of the peer, or one alone."""
    ours = found[work, "cutaway"]
    low, middle, high = statistics.quantiles([c for c, _ in ours], n=4)
    wall = round(statistics.median(w for _, w in ours), 3)
    words = f"{WORKS[work]}, {CONTEXTS * LENGTH} tokens"
    row = Row(words, round(middle, 3), UNIT, quartiles=(round(low, 3), round(high, 3)), wall=wall)
    compared = [
        row.against(says.format(release), round(statistics.median(c for c, _ in found[work, way]), 2), least)
        for way, (says, least) in PEERS.items()
        if (work, way) in found
    ]
    return compared or [row]


def cutaway(folder: str, tokens: int = CONTEXTS * LENGTH) -> tuple[str, dict[tuple[str, str], Maker]]:
    """`features.harvest`, with its defaults but that no token is masked, as in the peer."""
    import torch

    import cutaway as ca
    from cutaway.dictionaries.gates import Relu, TopK
    from cutaway.dictionaries.transforms import autoencoder
    from cutaway.features import FeatureStore, harvest
    from cutaway.streams import Masking, Packing, from_ids

    ids, w, threshold = given(folder)
    model, zero = ca.load(folder, check=False), torch.zeros
    gates = {"relu": (Relu(), torch.full((LATENTS,), -threshold)), "topk": (TopK(ACTIVE), zero(LATENTS))}

    def maker(work: str) -> Maker:
        gate, bias = gates[work]
        d = autoencoder(f"resid_post.{LAYER}", w, w, bias, zero(WIDTH), gate)

        def run() -> list[int]:
            with tempfile.TemporaryDirectory() as out:
                store: FeatureStore = harvest(model, d, from_ids(ids[: tokens // LENGTH]), Path(out, "store"),
                    packing=Packing(LENGTH, rows=ROWS), masking=Masking(special=False, sinks=None))  # fmt: skip
                return store.latents().count[:SHOWN].tolist()

        return Maker(LATENTS, run, lambda found: found)

    return ca.__version__, {(work, "cutaway"): maker(work) for work in WORKS}


def saedashboard(folder: str) -> tuple[str, dict[tuple[str, str], Maker]]:
    """SAEDashboard's runner over a HookedTransformer of the same weights, with and without its cache."""
    import torch
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from transformer_lens import loading_from_pretrained as loading
    from transformers import GPT2LMHeadModel

    ids, w, threshold = given(folder)
    hf = GPT2LMHeadModel.from_pretrained(folder)
    config = loading.get_pretrained_model_config(folder, fold_ln=False, device="cpu")
    model: Any = HookedSAETransformer(config)
    plain = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(loading.get_pretrained_state_dict(folder, config, hf), **plain)
    sizes = {"d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False}

    def dictionary(work: str) -> Any:
        if work == "relu":
            sae: Any = StandardSAE(StandardSAEConfig(**sizes))
            sae.b_enc.data.fill_(-threshold)
        else:
            sae = TopKSAE(TopKSAEConfig(**sizes, k=ACTIVE, rescale_acts_by_decoder_norm=True))
            sae.b_enc.data.zero_()
        sae.W_enc.data, sae.W_dec.data = w.T.contiguous(), w.clone()
        sae.b_dec.data.zero_()
        return sae

    def maker(work: str, cache: Path | None) -> Maker:
        sae = dictionary(work)

        def run() -> Any:
            config = SaeVisConfig(f"blocks.{LAYER}.hook_resid_post", list(range(SHOWN)), cache_dir=cache)
            return SaeVisRunner(config).run(sae, model, ids[:CONTEXTS])

        def counts(found: Any) -> list[int]:
            data = found.feature_data_dict
            return [int(sum(data[i].acts_histogram_data.bar_heights)) for i in range(SHOWN)]

        return Maker(SHOWN, run, counts)

    caches = {"default": None, "cached": Path(folder, "cache")}
    makers = {(work, way): maker(work, cache) for work in WORKS for way, cache in caches.items()}
    with torch.no_grad():
        makers["relu", "cached"].run()  # fills the cache
    return version("sae-dashboard"), makers


SUBJECTS = {"cutaway": cutaway, "saedashboard": saedashboard}


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    with contextlib.redirect_stdout(sys.stderr):
        release, makers = SUBJECTS[name](folder)

    def answer(work: str, way: str) -> dict[str, Any]:
        maker, found = makers[work, way], []
        with contextlib.redirect_stdout(sys.stderr):
            cpu, wall = spent(lambda: found.append(maker.run()))
        return {"cpu": 1e3 * cpu / maker.latents, "wall": 1e3 * wall / maker.latents, "counts": maker.counts(found[0])}

    serve({"version": release}, answer)


# --- memory


def memory(folder: str) -> list[Row]:
    """The rows of peak memory, in MiB."""
    found = [round(peak_of(folder, tokens)) for tokens in TOKENS]
    bars = [None, *[round(FLAT * found[0])] * (len(found) - 1)]
    return [
        Row(f"peak memory, {tokens} tokens", mib, "MiB", bar)
        for tokens, mib, bar in zip(TOKENS, found, bars, strict=True)
    ]


def peak_of(folder: str, tokens: int) -> float:
    """Peak growth of a fresh process in a harvest of so many tokens, in MiB."""
    command = [sys.executable, "-m", "bench.features", "--peak", folder, str(tokens)]
    done = subprocess.run(command, cwd=ROOT, env={**quiet(), **AT_ONCE}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    mib = json.loads(done.stdout.splitlines()[-1]) / 2**20
    print(f"{tokens} tokens: {mib:.0f} MiB", file=sys.stderr, flush=True)
    return mib


def peak(folder: str, tokens: int) -> int:
    """Bytes by which this process grows at most in a harvest."""
    cutaway(folder, LENGTH * ROWS)[1]["relu", "cutaway"].run()  # what a process needs only once
    return grown(cutaway(folder, tokens)[1]["relu", "cutaway"].run)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    elif sys.argv[1:2] == ["--peak"]:
        print(json.dumps(peak(sys.argv[2], int(sys.argv[3]))))
    else:
        sys.exit(main())
