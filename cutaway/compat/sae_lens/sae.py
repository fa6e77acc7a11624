"""Sparse autoencoders and transcoders with SAELens' members, computed by the house's gates and normalisations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.compat.sae_lens.configs import TABLE, SAEConfig
from cutaway.compat.sae_lens.directory import place
from cutaway.compat.transformer_lens.hook_points import HookedRootModule, HookPoint
from cutaway.core.refuse import Refused
from cutaway.dictionaries import formats
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.formats import saelens
from cutaway.dictionaries.formats.saelens_old import modern
from cutaway.dictionaries.formats.shared.files import Files, write_config, write_plain
from cutaway.dictionaries.formats.shared.located import located
from cutaway.dictionaries.norms import TokenLayerNorm, TokenNorm

SPARSITY = "sparsity.safetensors"
_NORMS = {"constant_norm_rescale": TokenNorm(), "layer_norm": TokenLayerNorm(1e-5)}
_OPEN = {"norm_weight": "included", "centered": False}  # activations are a HookedTransformer's, as in training


class SAE(HookedRootModule):
    """A sparse autoencoder or transcoder; it also unpacks as (sae, cfg, sparsity), as versions 3 to 5 returned it.

    Attributes:
        W_enc: encoder [d_in, d_sae]; the decoder W_dec is [d_sae, d_out].
        use_error_term: True to add what the reconstruction misses, so that only changes to latents have an effect.
        sparsity: log10 of the share of tokens on which each latent is active [d_sae], or None.
    """

    kind: ClassVar[str] = ""
    own: ClassVar[tuple[str, ...]] = ()  # parameters beside W_dec and b_dec
    cfg: Any
    W_enc: Any
    W_dec: Any
    dtype = property(lambda self: self.W_dec.dtype)
    device = property(lambda self: self.W_dec.device)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __new__(cls, cfg: SAEConfig | None = None, *_: Any, **__: Any) -> Any:
        return super().__new__(cls if cls.kind or cfg is None else CLASSES[cfg.architecture()])

    def __init__(self, cfg: SAEConfig, use_error_term: bool = False):
        super().__init__()
        self.cfg, self.use_error_term, self.sparsity = cfg, use_error_term, None
        self.norm, self.measured, self.heads = _NORMS.get(cfg.normalize_activations), (), None
        self.read: Tensor | None = None  # of an attached transcoder: what the hook point it reads saw
        n, d_in, d_out = cfg.d_sae, cfg.d_in, getattr(cfg, "d_out", cfg.d_in)
        shapes = {"W_dec": (n, d_out), "b_dec": (d_out,), "W_enc": (d_in, n), "W_skip": (d_out, d_in)}
        for name in ("W_dec", "b_dec", *self.own):
            zeros = torch.zeros(shapes.get(name, (n,)), device=cfg.device, dtype=_dtype(cfg.dtype))
            self.register_parameter(name, nn.Parameter(zeros))
        nn.init.kaiming_uniform_(self.W_dec)
        if "W_enc" in self.own:
            nn.init.kaiming_uniform_(self.W_enc) if "d_out" in cfg.words else self.W_enc.data.copy_(self.W_dec.data.T)
        for point in ("input", "acts_pre", "acts_post", "recons", "output", "error"):
            setattr(self, f"hook_sae_{point}", HookPoint())
        self.setup()

    def _at(self, point: str, x: Tensor, hooked: bool) -> Tensor:
        return getattr(self, f"hook_sae_{point}")(x) if hooked else x

    def encode(self, x: Float[Tensor, "..."], hooked: bool = True) -> Float[Tensor, "... d_sae"]:
        """Return the active latents; heads may stand in an axis of their own."""
        x, self.heads = x.to(self.dtype), x.shape[-2:] if x.shape[-1] != self.cfg.d_in else None
        x = self._at("input", x if self.heads is None else x.flatten(-2), hooked)
        shape, x = (*x.shape[:-1], self.cfg.d_sae), x.reshape(-1, self.cfg.d_in)
        x, self.measured = (x, ()) if self.norm is None else self.norm.into(x)
        x = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        gate: Any = saelens.gate_of(self.kind, vars(self.cfg), dict(self.named_parameters()), self.kind)
        if gate.greedy:
            code = gate.pursue(x, self.W_dec).dense()
        elif self.kind == "gated":  # hooks see the pre-activation of the magnitude
            magnitude = self._at("acts_pre", (x @ self.W_enc * self.r_mag.exp() + self.b_mag).view(shape), hooked)
            code = magnitude.relu().view(-1, self.cfg.d_sae) * (x @ self.W_enc + self.b_gate > 0)
        else:
            pre = self._at("acts_pre", (x @ self.W_enc + self.b_enc).view(shape), hooked) * self.scale
            code = gate.apply(pre.view(-1, self.cfg.d_sae)).dense()
        return self._at("acts_post", code.view(shape), hooked)

    @property
    def scale(self) -> Tensor | float:
        """Norms of the decoder's rows where latents are compared in units of them, else 1."""
        return self.W_dec.norm(dim=-1) if getattr(self.cfg, "rescale_acts_by_decoder_norm", False) else 1.0

    def decode(self, feature_acts: Float[Tensor, "... d_sae"], hooked: bool = True) -> Tensor:
        """Return the reconstruction [..., d_out], without a skip."""
        out = feature_acts / self.scale @ self.W_dec
        untied = self.kind != "matching_pursuit" or self.cfg.apply_b_dec_to_input
        out = self._at("recons", out + self.b_dec if untied else out, hooked)
        if self.norm is not None and "d_out" not in self.cfg.words:
            out = self.norm.back(out.view(-1, self.cfg.d_in), self.measured).view_as(out)
        return out if self.heads is None else out.unflatten(-1, self.heads)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x; of a spliced transcoder, that of what the hook point it reads saw."""
        source, self.read = x if self.read is None else self.read, None
        skipped = source @ self.W_skip.T if "W_skip" in self.own else 0.0
        out = self.decode(self.encode(source)) + skipped
        if self.use_error_term:
            with torch.no_grad():
                missed = x - self.decode(self.encode(source, hooked=False), hooked=False) - skipped
            out = out + self.hook_sae_error(missed)
        return self.hook_sae_output(out)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Scale the decoder's rows to norm one, and the latents by what they had.

        Raises:
            Refused: other latents would be active.
        """
        if self.kind == "matching_pursuit" or ("k" in self.cfg.words and isinstance(self.scale, float)):
            raise Refused(f"fold_W_dec_norm of {self.kind}", "other latents would be active", "leave the norms")
        norms = self.W_dec.norm(dim=-1).clamp(min=1e-8)
        self.W_dec /= norms[:, None]
        for name in set(self.own) - {"r_mag", "W_skip"}:
            getattr(self, name).mul_(norms)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write the weights and the configuration into a folder; return both files."""
        weights = write_plain(Path(path) / saelens.WEIGHTS, self.state_dict())
        return weights, write_config(Path(path) / saelens.CONFIG, self.cfg.to_dict())

    @classmethod
    def load_from_disk(
        cls, path: str | Path | Dictionary, device: str = "cpu", dtype: str | None = None, **how: Any
    ) -> Any:
        """Open a dictionary of the house: one in memory, or a path in any of its formats."""
        files = None if isinstance(path, Dictionary) else Files(located(path))
        there = files.json(saelens.CONFIG) if files else {}
        there = there if "metadata" in there or not there else modern(there)
        stored = there.get("dtype", "float32")
        opened = path if isinstance(path, Dictionary) else formats.load(path, **(_OPEN if there else {}))
        config, tensors = saelens.described(opened)
        facts = config.pop("metadata") | {"sae_lens_training_version": None}
        del facts["sae_lens_version"]  # of the writer, not of its file
        facts |= there.get("metadata", {})
        sae = SAE(SAEConfig.from_dict(there | config | {"metadata": facts, "device": device, "dtype": dtype or stored}))
        if not isinstance(sae, cls):
            raise Refused(f"{cls.__name__} from {str(path)!r}", f"it is a {type(sae).__name__}", "use SAE, or that")
        sae.load_state_dict(tensors)
        sae.sparsity = files.tensors(SPARSITY)["sparsity"] if files and files.has(SPARSITY) else None
        if how.get("fold_W_dec_norm"):
            sae.fold_W_dec_norm()
        return sae

    load_from_pretrained = load_from_disk

    @classmethod
    def from_pretrained(cls, release: str, sae_id: str = "", device: str = "cpu", **how: Any) -> Any:
        """Open the SAE of a release: a local name (`directory.LOCAL`), a folder, or one of the hub."""
        where, facts = place(release, sae_id)
        sae = where if isinstance(where, SAE) else cls.load_from_disk(where, device, how.pop("dtype", "float32"), **how)
        sae.cfg.metadata.update(facts)
        return sae

    @classmethod
    def from_pretrained_with_cfg_and_sparsity(cls, *release: Any, **how: Any) -> tuple[Any, dict[str, Any], Any]:
        """Return the SAE, its configuration as a dictionary, and its sparsity: what versions 3 to 5 returned."""
        sae = cls.from_pretrained(*release, **how)
        return sae, sae.cfg.to_dict(), sae.sparsity

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        """Return a fresh SAE of a configuration of any version."""
        return SAE(SAEConfig.from_dict(config_dict))

    def __iter__(self) -> Iterator[Any]:
        warnings.warn("SAE.from_pretrained returns the SAE alone since version 6", DeprecationWarning, stacklevel=2)
        return iter((self, self.cfg.to_dict(), self.sparsity))


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, str(name).removeprefix("torch."))


CLASSES: dict[str, Any] = {
    kind: type(row["class"], (SAE,), {"kind": kind, "own": tuple(row["own"]), "__module__": __name__})
    for kind, row in TABLE["frozen"].items()
}
