"""What the tests of formats share: random parts, plain formulas for gates, and the way there and back."""

from pathlib import Path

import torch
from torch import Tensor

from cutaway.dictionaries import formats
from cutaway.dictionaries.dictionary import Dictionary

D, F, N = 6, 20, 40
_DRAWS = torch.Generator()


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in single precision."""
    return torch.randn(*shape, generator=_DRAWS.manual_seed(seed)) * scale


def acts(width: int = D, seed: int = 99) -> Tensor:
    """Activations with a mean."""
    return draw(N, width, seed=seed) * 2 + draw(width, seed=seed + 1)


def kept(x: Tensor, k: int) -> Tensor:
    """Zero but for each row's k largest."""
    least = x.sort(-1, descending=True).values[:, k - 1 : k]
    return x * (x >= least)


def near(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    """Equal but for rounding, and not both nothing."""
    b = b.to(torch.float64)
    return bool(b.abs().max() > 0.1) and float((a.double() - b).abs().max() / b.abs().max()) < tolerance


def there_and_back(d: Dictionary, path: Path, format: str, x, written: str | None = None, **choices) -> Dictionary:
    """Write a dictionary, see that only its format fits, and that what is read is the same map."""
    formats.write(d, path, format)
    assert formats.detect(path) == [written or format]
    again = formats.load(path, **choices)
    one, two = d.forward(x), again.forward(x)
    for s, y in one.items() if isinstance(one, dict) else [("", one)]:
        assert near(two[s] if s else two, y)
    assert torch.equal(d.encode(x).counts(), again.encode(x).counts())
    assert again.reads == d.reads
    assert again.writes == d.writes
    return again
