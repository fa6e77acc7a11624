"""TransformerLens' own tests through the import aliases: how many of those that pass there pass here.

Run as `python -m bench.compat_tests`, with the options of `bench.compat.unit_tests`, which says how. What fails only
here is in the table of docs/compat.md (private methods, experts, ALiBi, growing rotary tables, conversions, patches of
the alias's own names by `mock`, a deprecation), but for four tests of `tokenize_and_concatenate`, whose hashing by
`datasets` fails under the aliases, which is open. These results: version 3.5.1, twelve files or folders. Not run to an
end on both sides: version 2, hooks on GPT-2, caches of keys and values, left padding, beginnings of text, tokenisation.
"""

from __future__ import annotations

import sys

from bench.compat.unit_tests import main

if __name__ == "__main__":
    sys.exit(main())
