# %% [markdown]
# # 2. Ablation
#
# Every committed record, side by side. Nothing is trained here: each number is computed from the predictions that a
# record holds (`facemask reproduce --all` checks them), so this notebook grows with `experiments/`.

# %%
import matplotlib.pyplot as plt
import pandas as pd

from facemask.config import ROOT
from facemask.dashboard import ablation, arms_of, by_fraction, curves, data_efficiency, forest, read_spec
from facemask.errors import UserError
from facemask.runs.compare import compare

spec, arms = read_spec(), arms_of(ROOT / "experiments")
columns, rows = ablation(arms, spec)
pd.DataFrame(rows, columns=columns).set_index("arm")

# %% [markdown]
# In brackets 95 % intervals: over seeds or folds (t) where a record has several, else over pictures. Arms on different
# pictures are not comparable.
#
# ## Forest plots

# %%
colours = [f"C{number}" for number in range(10)]
for metric in spec["forest"]:
    forest(arms, spec["split"], metric, "C0", "0.4", plt.figure(figsize=(7, 1 + 0.3 * len(arms)), layout="constrained"))
plt.show()

# %% [markdown]
# ## Curves by arm
#
# Mean over the runs of an arm, and their range.

# %%
for quantity in spec["curves"]:
    curves(arms, quantity, colours, plt.figure(figsize=(7, 2.6), layout="constrained"))
plt.show()

# %% [markdown]
# ## Data efficiency
#
# Arms that differ in `data.fraction` alone.

# %%
if groups := by_fraction(arms):
    data_efficiency(groups, spec["split"], "accuracy", colours, plt.figure(figsize=(7, 3), layout="constrained"))
    plt.show()
else:
    print("no record has a twin of another data.fraction")

# %% [markdown]
# ## Differences, paired by picture
#
# A row per record that was tested on the same pictures as the first of its kind: what `facemask compare` says.

# %%
for number, first in enumerate(arms):
    for other in arms[number + 1 :]:
        try:
            found = compare([ROOT / "experiments" / arm.name for arm in (first, other)], "accuracy", [], spec["split"])
        except UserError:
            continue  # other pictures
        for row in found["recipe"] or found["weights"]:
            interval = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
            print(f"{other.name} - {first.name}: {100 * row['difference']:+.1f} points {interval}")
if len(arms) < 2:
    print("one record: nothing to compare")
