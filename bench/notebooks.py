"""Cells of public notebooks under the façades, beside the original packages: how many leave the same values.

Run as `python -m bench.notebooks`, with the options of `bench.compat.notebooks`, which says what is compared. Rows
of circuit-tracer's attribution, IOI and modular arithmetic are of runs before the last mends. Not run yet with these
results: attribution patching, SAELens' logit lens, transformers from scratch (25 of 39 before tokenizers and parts were
mended).
"""

from __future__ import annotations

import sys

from bench.compat.notebooks import main

if __name__ == "__main__":
    sys.exit(main())
