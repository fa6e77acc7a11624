"""cutaway: mechanistic interpretability you can check.

    import cutaway as ca
    model = ca.load("miniworld")

The rooms (`ca.lenses`, `ca.patching`, …) and everything heavy load when first used.
"""
