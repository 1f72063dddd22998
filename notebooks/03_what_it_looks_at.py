# %% [markdown]
# # 3. What it looks at
#
# A DeiT with two heads, trained on drawn faces in about a minute, or your own: `RUN=runs/mine jupyter lab`. Maps of
# attention are easy to make and easy to believe, so the last cell measures whether they point at what decides.

# %%
import os
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import pandas as pd

from facemask.config import ROOT
from facemask.data.synthetic import write_folder
from facemask.explain import areas, describe, gain, maps, overlay
from facemask.predict import load_model

run, scratch = os.environ.get("RUN"), mkdtemp()
if run is None:
    run = f"{scratch}/run"
    options = (
        "model=deit_distilled distill=none data.num_images=1600 model.img_size=64 model.depth=4 trainer.max_epochs=10"
    )
    places = [f"run_dir={run}", f"cache_dir={scratch}/cache", f"ledger={scratch}/ledger.jsonl", "logger=none"]
    subprocess.run([sys.executable, "train.py", *options.split(), *places], cwd=ROOT, check=True, capture_output=True)
model = load_model(run)

# %% tags=["varies"]
pd.read_csv(f"{run}/curves.csv").groupby("epoch")[["train/loss_epoch", "val/accuracy", "val/nll"]].max().round(3)

# %% [markdown]
# ## Maps
#
# Attention rollout (where information could flow), gradient-weighted attention (what speaks for the decision) and
# occlusion (how much a grey window costs), on faces that the run has not seen.

# %% tags=["varies"]
write_folder(Path(scratch, "faces"), 24, 77)
files = sorted(Path(scratch, "faces").glob("with*_mask/*.*"))
shown = [files[0], files[3], files[-1], files[-4]]
figure, grid = plt.subplots(len(shown), 6, figsize=(10, 1.75 * len(shown)), layout="constrained")
for file, axes in zip(shown, grid, strict=True):
    view, prediction = model.view(file), model.predict(file)[0]
    pictures = [(f"{file.parent.name}\ndecided {prediction.label}", view)]
    for kind, heat in maps(model, view).items():
        pictures.append((describe(kind, model).replace(", ", "\n"), overlay(view, heat)))
    for axis, (name, picture) in zip(axes, pictures, strict=False):
        axis.imshow(picture)
        axis.set_title(name, fontsize=7)
        axis.axis("off")
plt.show()

# %% [markdown]
# ## Are the maps right?
#
# Deletion: the places that a map calls important turn grey first, and the decision should fall fast. Insertion: they
# turn sharp first, and it should rise fast. Gain: how much better than an order drawn at random, of 1, with its 95 %
# interval; `facemask explain` measures it on the run's own pictures.

# %% tags=["varies"]
measured = pd.DataFrame([row for file in files for row in areas(model, model.view(file), file.name)])
gains = {
    (kind[0], kind[1]): [round(found.difference, 3), round(found.low, 3), round(found.high, 3)]
    for kind, of in measured.groupby(["method", "head"])
    if (found := gain(of, of["id"].to_numpy()))
}
pd.DataFrame.from_dict(gains, orient="index", columns=["gain", "low", "high"])
