# %% [markdown]
# # 1. Data audit
#
# What a data set gives away before any model sees a mask: copies on both sides of a split, labels in conflict, and how
# far one gets from file size, format or a 32 x 32 thumbnail. Here on faces that the project draws itself, whose label
# lies in the mask alone; `DATA=PICTURES jupyter lab` shows your own (one sub-folder per class).

# %%
import os
from tempfile import mkdtemp

import matplotlib.pyplot as plt
from rich.console import Console

from facemask import audit
from facemask.data.datamodule import FolderData, SyntheticData
from facemask.data.transforms import Augmentation
from facemask.runs.metrics import evaluate
from facemask.runs.page import show

common = {"augmentation": Augmentation(0, 64), "img_size": 64, "cache_dir": mkdtemp()}
folder = os.environ.get("DATA")
data = FolderData(root=folder, on_bad_file="skip", **common) if folder else SyntheticData(num_images=600, **common)
data.prepare(["test"])
data.table.groupby(["split", "label"]).size().unstack()

# %%
figure, grid = plt.subplots(2, 8, figsize=(9, 2.7), layout="constrained")
for label, axes in zip(data.classes, grid, strict=True):
    for path, axis in zip(data.table.query("label == @label")["path"][:8], axes, strict=True):
        axis.imshow(data.picture(path))
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel(label)

# %% [markdown]
# ## What can be told without the content
#
# Each line is a model that sees only what it is named after. On an honest data set they are near chance; on a scraped
# one, file facts alone may reach 90 %.

# %% tags=["varies"]
shortcuts = evaluate(audit.shortcut_predictions(data, degrade=0.5), data.classes, resamples=200)["test"]
figure, axis = plt.subplots(figsize=(7, 0.35 * len(shortcuts)), layout="constrained")
for place, entry in enumerate(shortcuts.values()):
    accuracy = entry["accuracy"]
    if accuracy["low"] is not None:
        axis.plot([accuracy["low"], accuracy["high"]], [place, place], color="C0")
    axis.plot(accuracy["value"], place, "sC0")
axis.set_yticks(range(len(shortcuts)), list(shortcuts))
axis.axvline(1 / len(data.classes), color="0.6", linewidth=0.8)
axis.set(xlabel="test accuracy, 95 % interval; grey line: chance", ylim=(len(shortcuts) - 0.5, -0.5))
plt.show()

# %% [markdown]
# ## The whole audit
#
# The same as `facemask data audit`, which writes it as one page.

# %% tags=["varies"]
show(
    audit.audit(data, 0.5, folder or "600 drawn faces"),
    Console(width=110, color_system=None, force_jupyter=False),
    rows=8,
)
