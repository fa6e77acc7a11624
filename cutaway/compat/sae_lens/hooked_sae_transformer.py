"""Models to which SAEs and transcoders are attached: each stands in place of the hook point that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from cutaway.compat.sae_lens.sae import SAE
from cutaway.compat.transformer_lens.hooked_transformer import HookedTransformer, TransformerBridge

SAEs = SAE | Iterable[SAE]


def _with_saes(run: str) -> Callable[..., Any]:
    def running(
        self: Any,
        *args: Any,
        saes: SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **how: Any,
    ) -> Any:
        with self.saes(saes, reset_saes_end, use_error_term):
            return getattr(self, run)(*args, **how)

    running.__doc__ = f"Call `{run}` with SAEs attached."
    return running


class _Attaching:
    """Methods that attach SAEs to a model and take them out.

    Attributes:
        acts_to_saes: the SAEs by the hook point that they read.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.acts_to_saes: dict[str, SAE] = {}
        self._undo: dict[str, ExitStack] = {}

    def add_sae(self: Any, sae: SAE, use_error_term: bool | None = None) -> None:
        """Attach an SAE in place of its hook point, or a transcoder in place of the one that it writes.

        Raises:
            Refused: the model has no hook point of that name.
        """
        reads = sae.cfg.metadata.hook_name
        writes = sae.cfg.metadata.hook_name_out or reads
        self.reset_saes([n for n in self.acts_to_saes if n == reads])
        for name in (reads, writes):
            if name not in self.mod_dict:
                self._points(name)  # refuses it
        undo = ExitStack()
        undo.callback(setattr, sae, "use_error_term", sae.use_error_term)
        if reads != writes:
            point = self.mod_dict[reads]
            point.add_hook(lambda x, hook: setattr(sae, "read", x), is_permanent=True)
            undo.callback(point.fwd_hooks.remove, point.fwd_hooks[-1])
            undo.callback(point.fwd_hooks[-1].hook.remove)
        undo.callback(self._put, writes, self.mod_dict[writes])
        self.acts_to_saes[reads], self._undo[reads] = sae, undo
        sae.use_error_term = sae.use_error_term if use_error_term is None else use_error_term
        self._put(writes, sae)

    def _put(self: Any, name: str, module: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.get_submodule(parent), last, module)
        self.setup()

    def reset_saes(self, act_names: str | Iterable[str] | None = None) -> None:
        """Take out the SAEs at these hook points, or all; those last attached first."""
        names = [act_names] if isinstance(act_names, str) else act_names
        for name in reversed([*(self.acts_to_saes if names is None else names)]):
            del self.acts_to_saes[name]
            self._undo.pop(name).close()

    @contextmanager
    def saes(self, saes: SAEs = (), reset_saes_end: bool = True, use_error_term: bool | None = None) -> Iterator[Any]:
        """Within the block, these SAEs are attached; behind it, those that were before."""
        before = [(sae, sae.use_error_term) for sae in self.acts_to_saes.values()]
        try:
            for sae in [saes] if isinstance(saes, SAE) else saes:
                self.add_sae(sae, use_error_term)
            yield self
        finally:
            if reset_saes_end:
                self.reset_saes()
                for sae, error in before:
                    self.add_sae(sae, error)

    run_with_saes = _with_saes("__call__")
    run_with_cache_with_saes = _with_saes("run_with_cache")
    run_with_hooks_with_saes = _with_saes("run_with_hooks")


class HookedSAETransformer(_Attaching, HookedTransformer):
    """A `HookedTransformer` to which SAEs can be attached."""


class SAETransformerBridge(_Attaching, TransformerBridge):
    """A `TransformerBridge` to which SAEs can be attached."""
