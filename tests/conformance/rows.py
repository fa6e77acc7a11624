"""Every method of the table with subjects to call it on, and the parameters of tests about all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import cutaway as ca
from cutaway.core.method import Method
from cutaway.core.outcome import each
from cutaway.core.result import Result
from cutaway.core.subject import Subject, examples, subject
from cutaway.models.model import Model
from cutaway.tasks.task import Task
from tests.conformance import subjects
from tests.models.common import widely

#: methods that refuse the models of these tests, whose circuits nobody knows; tests/circuits asks them the same
ELSEWHERE = {"circuits.truth"}
#: every method, and once more on each subject that may stand in place of its own
ROWS = {
    f"{name}({', '.join(names)})" if i else name: replace(row, subjects=names, fills=() if i else row.fills)
    for name, row in ca.methods().items()
    if name not in ELSEWHERE
    for i, names in enumerate(product(*row.takes()))
}
#: the fields that chance decides, and those that depend on how many prompts there are
CHANCE, OF_MANY = "null", "interval"


def arguments(name: str, model: Model, task: Task, /, **others: Any) -> tuple[Any, ...]:
    """The subjects of a method, in order: these, and an example of every other that suits them."""
    return tuple(examples(ROWS[name].subjects, {"model": model, "task": task, **others}).values())


@cache
def given(name: str, kind: str) -> tuple[Any, ...]:
    """The subjects of a method, around one of two models."""
    model = subjects.random_llama() if kind == "llama" else subjects.miniworld()
    task = subjects.llama_task() if kind == "llama" else subject("task").example({"model": model})
    return arguments(name, model, task)


def batch(name: str) -> Subject:
    """The subject of a method that is a batch of prompts."""
    return next(row for s in ROWS[name].subjects if (row := subject(s)).split is not None)


#: numbers of repetitions that make a call quick, for methods that have the option
QUICK = {"samples": 2, "steps": 4, "draws": 2}


#: what must be named where nothing is known of the task, or of latents that nobody trained
NAMED: dict[str, dict[str, Any]] = {
    "patching.group": {"heads": "0.0"},
    "patching.intervene": {"edits": "zero z.0.0"},
    "heads.card": {"head": "1.2"},
    "heads.card(model, repeats)": {"head": "1.2"},
    "heads.confirm": {"heads": "0.0"},
    "heads.confirm(model, repeats)": {"heads": "0.0"},
    "heads.function_vectors": {"shots": 2, "prompts": 2, "top": 2},
    "neurons.card": {"neuron": "1.7"},
    "neurons.arithmetic": {"operations": "+", "prompts": 4},
    "dictionaries.letter_absorption": {"examples": 1},
    "dictionaries.shift": {"most": 4},
    "features.contrast": {"top": 4},
    "circuits.exact": {"readers": "logits"},  # fewer edges than make a null
    "circuits.acdc": {"threshold": 1e-2},  # small: most edges are visited
    "circuits.certify": {"steps": 1, "draws": 1},  # each step is a gradient from each start
    "circuits.compare": {"reference": "z.0.0,mlp_out.1", "samples": 20},
    "graphs.feature_circuit": {"nodes": 0.0, "edges": 0.0},  # all nodes: nobody trained these latents
    "dictionaries.quiver": {"probes": "mean difference,logistic,1 latent,reconstruction"},
    "dictionaries.splitting": {"within": 0.4, "alike": 0.0},  # loose enough for parts among random latents
}
#: one address: the others are done alike
NAMED |= {f"directions.{n}": {"sites": "resid_post.1"} for n in ("erase", "find", "probe")}
#: few words, of what is generated
NAMED |= {
    "directions.complete": {"new_tokens": 4},
    "directions.intervene": {"forms": "add,per_layer,affine,weights"},
}
#: graphs of few nodes, which take no time
NAMED |= {n: {"nodes": 40} for n in ROWS if n.startswith("graphs.trace")}
NAMED |= {n: {"top": 4} for n in ROWS if n.startswith("graphs.qk")}
NAMED |= {n: {"nodes": 40, "top": 4} for n in ROWS if n.startswith("graphs.head_loadings")}
NAMED |= {n: {"nodes": 40, "top": 4, "rotations": 1} for n in ROWS if n.startswith("graphs.validate")}
NAMED |= {n: {"nodes": 40, "similarity": 0.0, "share": 1.0} for n in ROWS if n.startswith("graphs.supernodes")}


def outcomes(name: str, asked: Any, **options: Any) -> tuple[Any, ...]:
    """What one quick call of a method returns."""
    quick = {o.name: QUICK[o.name] for o in ROWS[name].options if o.name in QUICK}
    return each(ROWS[name].function(*asked, **{**quick, **NAMED.get(name, {}), **options}))


def call(name: str, asked: Any, **options: Any) -> Result:
    """The first result of one quick call of a method."""
    return next(r for r in outcomes(name, asked, **options) if isinstance(r, Result))


@cache
def everything(name: str, kind: str, **options: Any) -> tuple[Any, ...]:
    """What a method returns; on the Llama half in training, and watched."""
    return watched(name, **options)[0] if kind == "llama" else outcomes(name, given(name, kind), **options)


def found(name: str, kind: str, **options: Any) -> Result:
    """The first result of a method."""
    return next(r for r in everything(name, kind, **options) if isinstance(r, Result))


class Spy:
    """What a call must leave as it was: weights, hooks, methods, gradients, modes, and global sources of chance.

    Python's own is not looked at: the type checker of these tests draws from it.
    """

    def __init__(self, model: Model):
        self.model = model

    def state(self) -> dict[str, Any]:
        hf = self.model.hf
        return {
            "weights": self.model.fingerprint(),
            "hooks": [len(getattr(m, a)) for m in hf.modules() for a in vars(m) if a.endswith("hooks")],
            "attributes": [sorted(vars(m)) for m in hf.modules()],
            "parameters": [(n, id(p), p.requires_grad, p.grad is None) for n, p in hf.named_parameters()],
            "modes": [m.training for m in hf.modules()],
            "attention": hf.config._attn_implementation,
            "config": hf.config.to_json_string(),
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),
            "grad mode": torch.is_grad_enabled(),
        }


def half_trained() -> Model:
    """A model as a user may have it in hand: in train mode but for one part, some parameters frozen, dropout on."""
    model = subjects.random_llama()
    model.hf.train()
    model.hf.model.layers[1].mlp.eval()
    model.hf.model.embed_tokens.weight.requires_grad_(False)
    return model


@cache
def watched(name: str, **options: Any) -> tuple[tuple[Any, ...], bool]:
    """What a method returns on a Llama half in training, and whether it left the model and all chance as they were."""
    model = half_trained()
    asked, spy = arguments(name, model, subjects.llama_task()), Spy(model)
    before = spy.state()
    return outcomes(name, asked, **options), spy.state() == before


#: calls in which an option can be used that no call with it alone can
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "patching.ablate": [{"site": "mlp_out", "each_position": True}],
    "patching.activation": [
        {"site": "z", "by": "unit"}, {"site": "z", "by": "both", "metrics": "prob"}, {"site": "mlp_out", "window": 3},
        {"site": "mlp_post", "by": "auto"}, {"site": "z.1.2, resid_pre.1@-1"},
    ],
}  # fmt: skip


#: what must be named for prompts to be asked the same thing apart and together
FIXED: dict[str, dict[str, Any]] = {
    "lenses.debug": {"top": 1000},
    "features.latents": {"latents": "3,7,11"},
    "heads.confirm": {"how": "zero"},  # a mean is of all prompts
    "heads.roles": {"how": "zero"},
    "neurons.values": {"neurons": "0.3,1.7,1.40"},
    "neurons.triggers": {"neurons": "0.3,1.7,1.40"},
    "patching.causal_trace": {"by": "position"},
}


def variants(row: Method) -> Iterator[dict[str, Any]]:
    """The default call, and one for every choice, switch and number of an option."""
    yield {}
    together = TOGETHER.get(row.name, [])
    yield from together
    for o in row.options:
        values = [c for c in o.choices if c != o.default]
        values += [not o.default] if o.type is bool else [1] if o.type is int and o.name not in QUICK else []
        yield from ({o.name: v} for v in values if not any((o.name, v) in t.items() for t in together))


def same(a: Result, b: Result, names: set[str]) -> bool:
    """Whether the fields are equal bit for bit; NaN equals NaN."""
    x, y = a.tensors(), b.tensors()
    return all(x[n].shape == y[n].shape and torch.equal(x[n].nan_to_num(-7.0), y[n].nan_to_num(-7.0)) for n in names)


def settled(result: Result, *kinds: str) -> set[str]:
    """The fields that are not of these kinds: `interval` and `accuracy_interval` are both of kind "interval"."""
    return {n for n in result.tensors() if n.split("_")[-1] not in kinds}


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding; NaN equals NaN."""
    if not b.numel():
        return a.shape == b.shape
    atol = 2e-5 + 2e-4 * float(b.double().abs().nan_to_num().max())
    return torch.allclose(a.double(), b.double(), atol=atol, equal_nan=True)


#: the null that is looked at, where the main one is empty of a model that nobody trained
LOOKED_AT = {
    "retrieval_heads": "attended_null", "dictionary_shift": "reading_null", "interventions": "kl_null",
    "reweighting": "log_prob_null", "knowledge_edit": "kl_null",
}  # fmt: skip


def of_kind(result: Result, kind: str) -> str | None:
    """The field of the interval or null of the main field, or of the first field that has one."""
    if kind == CHANCE and result.kind in LOOKED_AT:
        return LOOKED_AT[result.kind]
    names = [f"{result.main}_{kind}", *(n for n in result.tensors() if n.split("_")[-1] == kind)]
    return next((n for n in (kind, *names) if n in result.tensors()), None)


#: the first method of each room: the suite asks it for the machinery behind all of them, the wide run asks all
SPEAKERS = set({name.split(".")[0]: name for name in reversed(ROWS)}.values())
methods = pytest.mark.parametrize("name", list(ROWS))
OF_MODELS = [n for n, r in ROWS.items() if "model" in r.subjects]
OF_PROMPTS = [n for n, r in ROWS.items() if any(subject(s).split for s in r.subjects)]
of_models_widely = pytest.mark.parametrize("name", widely(OF_MODELS, SPEAKERS))
NUMERIC = [n for n, r in ROWS.items() if any(issubclass(k, Result) for k in r.results)]
numeric = pytest.mark.parametrize("name", NUMERIC)
numeric_widely = pytest.mark.parametrize("name", widely(NUMERIC, SPEAKERS))
of_prompts_widely = pytest.mark.parametrize("name", widely(OF_PROMPTS, SPEAKERS))
kinds = pytest.mark.parametrize("kind", ["llama", pytest.param("miniworld", marks=pytest.mark.wide)])
OPTIONS_WIDELY = [
    pytest.param(n, o, marks=pytest.mark.wide if o else ()) for n, row in ROWS.items() for o in variants(row)
]
