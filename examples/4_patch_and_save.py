"""Chapter 4. A method on a task: activation patching with interval and control, saved and opened again."""

import tempfile
from pathlib import Path

import cutaway as ca

model = ca.load("miniworld")
task = ca.tasks.load("ioi", model, n=8)
print(task.pairs[0].clean, "→", task.pairs[0].answer, "|", task.corruption)

heads = ca.patching.activation(model, task, site="z")
for row in heads.top(3, by="recovered", largest=True):
    low, high = row["interval"]
    null = max(map(abs, row["null"]))
    print(
        f"head {row['layer']}.{row['head']}: {row['effect']:+.2f} [{low:.2f}, {high:.2f}], control at most {null:.2f}"
    )

with tempfile.TemporaryDirectory() as folder:
    path = heads.save(Path(folder) / "heads.safetensors")
    again = ca.open(path)
    print("the same after saving:", again.compare(heads)["effect"]["largest"] == 0.0)
print("again from the command line:", heads.record["command"])
