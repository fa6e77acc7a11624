"""Enrichment of sets of tokens among what latents promote, with the pictures of SAELens' tutorial."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import ascii_lowercase
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused


def get_letter_gene_sets(vocab: Mapping[str, int]) -> dict[str, set[int]]:
    """Return the tokens made of letters, by their first letter."""
    words = [(token.strip("Ġ"), id) for token, id in vocab.items()]
    return {c: {id for word, id in words if word.isalpha() and word[0].lower() == c} for c in ascii_lowercase}


def get_gene_set_from_regex(vocab: Mapping[str, int], pattern: str) -> set[int]:
    """Return the tokens that begin as a pattern says."""
    return {id for token, id in vocab.items() if re.match(pattern, token)}


def generate_pos_sets(vocab: Mapping[str, int]) -> dict[str, set[int]]:
    """Return the tokens by their part of speech; nltk tells it."""
    import nltk  # type: ignore[import-not-found]

    sets = dict[str, set[int]]()
    for token, id in vocab.items():
        sets.setdefault(f"nltk_pos_{nltk.pos_tag([token.strip('Ġ')])[0][1]}", set()).add(id)
    return sets


def get_enrichment_df(
    projections: Float[Tensor, "latent d_vocab"], features: Sequence[int], gene_sets_selected: dict[str, Any]
) -> Any:
    """Return how far the tokens of each set stand together when a latent ranks all: the largest |running sum|."""
    import pandas as pd

    gene_sets_selected.update({name: list(tokens) for name, tokens in gene_sets_selected.items()})
    order, n = projections[list(features)].sort(dim=1, descending=True).indices, projections.shape[1]
    scores = []
    for tokens in gene_sets_selected.values():
        size, member = torch.tensor(float(len(tokens))), torch.zeros(n, dtype=torch.bool)
        member[tokens] = True
        steps = torch.where(member[order], 1.0 / size, -1.0 / (n - size))
        scores.append(steps.cumsum(dim=1).abs().max(dim=1).values)
    return pd.DataFrame(torch.stack(scores).numpy(), index=list(gene_sets_selected), columns=list(features))


def manhattan_plot_enrichment_scores(df_enrichment_scores: Any, label_threshold: float = 1.0, top_n: int = 3) -> Any:
    """Draw −log(1 − score) of every latent, a panel for each set, the highest `top_n` of it named."""
    import numpy as np
    import plotly_express as px  # type: ignore[import-not-found]

    long = df_enrichment_scores.apply(lambda x: -1 * np.log(1 - x)).reset_index()
    long = long.melt(id_vars="index", var_name="Feature", value_name="Enrichment Score")
    long = long.rename(columns={"index": "gene_set"}).reset_index(drop=True)
    sets = list(long["gene_set"].unique())
    how: dict[str, Any] = {"color": long.gene_set, "facet_col": long.gene_set, "width": 1400, "height": 500}
    labels = {"index": "", "value": "Enrichment Score", "variable": "Token Set"}
    figure = px.scatter(long, x="Feature", y="Enrichment Score", labels=labels, **how)
    figure.update_traces(marker={"size": 3})
    for panel, name in enumerate(sets, 1):
        for _, row in long[long.gene_set == name].nlargest(top_n, "Enrichment Score").iterrows():
            if row["Enrichment Score"] > label_threshold:
                at = {"x": row["Feature"], "y": row["Enrichment Score"], "xref": f"x{panel}", "yref": f"y{panel}"}
                drawn = {"showarrow": False, "arrowhead": 1, "ax": 20, "ay": -30, "yshift": 15}
                figure.add_annotation(text=row["Feature"], **at, **drawn)
    figure.for_each_annotation(lambda a: a.update(text=a.text.split("=")[-1]))
    figure.update_layout(showlegend=False)
    figure.update_layout(font={"size": 16})
    return figure


def _refused(name: str, why: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise Refused(name, why, instead)

    return refuse


_SETS = "give sets of your own: {name: set of token ids}"
get_baby_name_sets = _refused("get_baby_name_sets", "the names are on an office's pages, not here", _SETS)
get_test_gene_sets = _refused("get_test_gene_sets", "the tutorial's lists of words are not here", _SETS)
plot_top_k_feature_projections_by_token_and_category = _refused(
    "plot_top_k_feature_projections_by_token_and_category", "its histograms are not drawn here", "plot the projections"
)
