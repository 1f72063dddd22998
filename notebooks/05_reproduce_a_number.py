# %% [markdown]
# # 5. Reproduce a number
#
# How far the accuracy of a record in the README can be followed back, without a GPU, pictures or weights.

# %%
import pandas as pd

from facemask.config import ROOT
from facemask.reproduce import reproduce
from facemask.runs.predictions import logits
from facemask.runs.record import mean_interval, read_record

record = read_record(ROOT / "experiments" / "smoke")
head = record.info["reported_head"]
[claim] = [claim for claim in record.claims if claim["claim"] == f"test/{head}/accuracy"]
pd.Series({key: claim[key] for key in ("claim", "value", "low", "high")})

# %% [markdown]
# ## By hand
#
# A record stores the logits of every picture. The accuracy is the share of pictures whose largest logit is the label's:

# %%
accuracies = {}
for run in record.runs:
    table, classes = record.predictions(run)
    test = table[table["split"] == "test"]
    decided = pd.Series(classes)[logits(test, head, classes).argmax(axis=1)].to_numpy()
    accuracies[run] = (decided == test["label"].to_numpy()).mean()
pd.Series(accuracies).round(6)

# %% [markdown]
# and what the README prints is their mean over the seeds, with its 95 % t-interval:

# %%
found = mean_interval([float(accuracy) for accuracy in accuracies.values()])
assert abs(found["mean"] - claim["value"]) < 1e-9
print(f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]")

# %% [markdown]
# ## By the project
#
# `facemask reproduce smoke` does this for every claim of the record, checks that no file was changed, and that splits,
# predictions and metrics do not contradict each other.

# %%
lines: list[str] = []
print("verdict:", reproduce(record.path, "metrics", lines.append))
print(*[line for line in lines if line.startswith(("PASS", "DRIFT", "FAIL"))], sep="\n")

# %% [markdown]
# ## Further back
#
# The predictions come from a training that anyone can repeat: the record names command, commit, seeds, versions and
# hardware, and on the same kind of machine the same bits come out.

# %%
print(record.info["runs"]["seed0"]["command"])
print(
    "facemask reproduce smoke --tier train      # PASS: the same bits; DRIFT: another machine, within what seeds allow"
)
