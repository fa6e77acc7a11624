"""Cells of public notebooks under the façades, beside the original packages: how many leave the same values.

Run as `python -m bench.notebooks`, with the options of `bench.compat.notebooks`, which says what is compared. Not run
yet with these results: IOI, attribution patching, head detector, logit lens, toy models, transformers from scratch.
"""

from __future__ import annotations

import sys

from bench.compat.notebooks import main

if __name__ == "__main__":
    sys.exit(main())
