"""Small models that learned what the programs of `compiled` compute.

    model = ca.load("learned/reverse")
    task = ca.tasks.load("reverse", model)

Each has as many layers and heads as the compiled program, so that the two have the same edges; but it has norms, GELU
and random first weights, and it learned from prompts and answers alone. Its circuit is its own, and nothing tells it:
what is known is what exact patching finds.
"""
