"""Chapter 2. Reading and editing activations: sites, addresses, edits, and what they do to the output."""

import cutaway as ca

model = ca.load("miniworld")
prompt = "When Mary and John went to the store, John gave a drink to"

acts = model.capture(prompt, ["resid_post", "pattern.4.0"])
print("residual stream after block 3:", tuple(acts["resid_post.3"].shape))
attention = acts["pattern.4.0"][0, -1]
print("head 4.0 looks from the end at:", acts.tokens.pieces[0][int(attention.argmax())])

mary, john = model.text.token_id("Mary"), model.text.token_id("John")


def difference(*edits):
    """logit(Mary) − logit(John) under edits."""
    logits = model.run_last(prompt, edits)[0]
    return float(logits[mary] - logits[john])


print(f"as it is: {difference():+.1f}")
print(f"without head 4.0: {difference(ca.edits.Ablate('z.4.0')):+.1f}")
blind = [ca.edits.Knockout(f"pattern.{layer}", queries=(-1,), keys=(2,)) for layer in range(model.shape.n_layers)]
print(f"no attention from the end to 'Mary': {difference(*blind):+.1f}")
