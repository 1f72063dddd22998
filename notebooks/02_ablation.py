# %% [markdown]
# # 2. Ablation
#
# Every committed record, side by side. Nothing is trained here: each number is computed from the predictions that a
# record holds (`facemask reproduce --all` checks them), so this notebook grows with `experiments/`.

# %%
import json

import matplotlib.pyplot as plt
import pandas as pd

from facemask.config import ROOT
from facemask.dashboard import ablation, arms_of, by_fraction, curves, data_efficiency, families, forest, read_spec
from facemask.errors import UserError
from facemask.files import read_yaml
from facemask.runs.compare import compare

spec, study, arms = read_spec(), read_yaml(ROOT / "conf/study.yaml"), arms_of(ROOT / "experiments")
columns, rows = ablation(arms, spec)
pd.DataFrame(rows, columns=columns).set_index("arm")

# %% [markdown]
# In brackets 95 % intervals: over seeds or folds (t) where a record has several, else over pictures. Arms on different
# pictures are not comparable.
#
# ## Forest plots

# %%
plt.rcParams["figure.dpi"] = 80
colours = [f"C{number}" for number in range(10)]
for metric in spec["forest"]:
    forest(arms, spec["split"], metric, "C0", "0.4", plt.figure(figsize=(7, 1 + 0.3 * len(arms)), layout="constrained"))
plt.show()

# %% [markdown]
# ## Curves by arm
#
# Mean over the runs of an arm, and their range: records of no study, then the groups of `conf/study.yaml`. Losses are
# on the page of `facemask dashboard`.

# %%
for title, family in families(arms, study).items():
    figure = plt.figure(figsize=(8, 2.6), layout="constrained")
    curves(family, spec["curves"][0], colours, figure)
    figure.suptitle(title)
plt.show()

# %% [markdown]
# ## Data efficiency
#
# Arms that differ in `data.fraction` alone, and in how many epochs they train.

# %%
if groups := by_fraction(arms):
    data_efficiency(groups, spec["split"], "accuracy", colours, plt.figure(figsize=(8, 3), layout="constrained"))
    plt.show()
else:
    print("no record has a twin of another data.fraction")

# %% [markdown]
# ## Differences, paired by picture
#
# The contrasts of the study, as `facemask study` left them, in points of test accuracy; Holm's p is corrected for all
# exploratory ones. What each asks, and what it cannot say: `experiments/PROTOCOL.md`.

# %%
file = ROOT / "experiments" / study["name"] / "contrasts.json"
contrasts = json.loads(file.read_text()) if file.exists() else []
pd.DataFrame(
    {
        "contrast": f"{row['arm']} - {row['reference']}",
        "kind": row["kind"],
        "difference": f"{100 * over['difference']:+.1f} [{100 * over['low']:+.1f}, {100 * over['high']:+.1f}]",
        "over": f"{over['runs']} {over['over']}",
        "p": f"{over['p']:.2g}" if row["kind"] != "post hoc" else "",
        "p Holm": f"{row['p_holm']:.2g}" if "p_holm" in row else "",
    }
    for row in contrasts
    for over in [row["recipe"]]
)

# %% [markdown]
# Other records that were tested on the same pictures: what `facemask compare` says.

# %%
alone = families(arms, study).get("arms of no study", [])
for number, first in enumerate(alone):
    for other in alone[number + 1 :]:
        try:
            found = compare([ROOT / "experiments" / arm.name for arm in (first, other)], "accuracy", [], spec["split"])
        except UserError:
            continue  # other pictures
        for row in found["recipe"] or found["weights"]:
            interval = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
            print(f"{other.name} - {first.name}: {100 * row['difference']:+.1f} points {interval}")
