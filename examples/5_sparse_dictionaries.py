"""Chapter 5. Sparse dictionaries: one that ships, judged beside controls, spliced into the model, a latent ablated."""

import torch

import cutaway as ca
from cutaway.dictionaries import Splice, ablate_latents, add_to_latents
from cutaway.dictionaries import evaluation as judge
from cutaway.streams import LiveStream, Packing, from_texts

model = ca.load("miniworld")
dictionary = ca.dictionaries.load("miniworld/resid_post.3")  # or a file of any format, or org/repo/folder of the hub
print(dictionary)

names = ["Mary", "John", "Anna", "Tom", "Alice", "Peter"]
pairs = [(a, b) for a in names for b in names if a != b]
texts = from_texts([f"When {a} and {b} went to the store, {b} gave a drink to {a}" for a, b in pairs])
stream = LiveStream(model, texts, dictionary.reads, packing=Packing(context=32), batch=128)
scores = judge.evaluate(dictionary, judge.Evidence.gather(stream, 400))
fvu = scores["FVU"]
print(f"fraction of variance unexplained: {fvu.value:.3f}, a random dictionary {sum(fvu.null) / len(fvu.null):.2f}")
print({name: round(value, 3) for name, value in fvu.control.items()})

prompt = "When Mary and John went to the store, John gave a drink to"
mary, john = model.text.token_id("Mary"), model.text.token_id("John")


def difference(*edits):
    """logit(Mary) − logit(John) under edits."""
    logits = model.run_last(prompt, edits)[0]
    return float(logits[mary] - logits[john])


def changed(change):
    """What a change of latents does to it; the error of the reconstruction stays as it is."""
    return difference(Splice(dictionary, error=True, changes=(change,))) - whole


whole = difference()
print(f"as it is: {whole:+.1f}, with the reconstruction in its place: {difference(Splice(dictionary)):+.1f}")
code = dictionary.encode(model.capture(prompt, dictionary.reads)).dense()[-1]
effects = {int(i): changed(ablate_latents(int(i), positions=(-1,))) for i in code.topk(6).indices}
latent = max(effects, key=lambda i: abs(effects[i]))
silent = (code == 0).nonzero()[:, 0]
others = silent[torch.randperm(len(silent), generator=torch.Generator().manual_seed(0))[:4]].tolist()
null = [changed(add_to_latents(i, value=-float(code[latent]), positions=(-1,))) for i in others]
print(f"without latent {latent} at the end: {effects[latent]:+.2f}")
print("random latents, lowered as much:", ", ".join(f"{v:+.2f}" for v in null))
