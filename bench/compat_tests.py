"""TransformerLens' own tests through the import aliases: how many of those that pass there pass here.

Run as `python -m bench.compat_tests`, with the options of `bench.compat.unit_tests`, which says how; the original is
version 3.9 for both versions of the tests. What fails only here is in the table of docs/compat.md: private methods,
experts, ALiBi tables, growing rotary tables, conversions, patches of the alias's own names by `mock`, a deprecation,
the words of refusals, IOI and MMLU among the evaluations. These results: of version 3.5.1 all on the list (those of
GPT-2's published values are skipped on both sides); of version 2.16.1 the unit tests and those of losses, hooks,
tokenisation and of starting and stopping at a layer (its tests of masks, caches and padding do not import in 3.9).
"""

from __future__ import annotations

import sys

from bench.compat.unit_tests import main

if __name__ == "__main__":
    sys.exit(main())
