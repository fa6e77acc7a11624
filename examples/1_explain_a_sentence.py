"""Chapter 1. Why did the model say that? One sentence, five methods, every claim beside its control."""

import cutaway as ca

model = ca.load("miniworld")
found = ca.explain(model, "The capital of France is", effort="quick")
print(found.prompt, found.answer)
for line in found.summary:
    print("-", line)
for verdict in found.verdicts:
    print("truth:", verdict.text, "·", verdict.detail)
