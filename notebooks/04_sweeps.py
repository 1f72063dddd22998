# %% [markdown]
# # 4. Sweeps
#
# A search of four short trials, made here: every trial is a `train.py` of its own, looked at on the validation split
# alone. `SWEEP=NAME jupyter lab` shows one of yours instead (`SWEEP_STORAGE` as in `sweep.storage`).

# %%
import os
import subprocess
import sys
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import pandas as pd

from facemask.config import ROOT
from facemask.runs.sweep_page import bars, importance_of, parallel, ranked
from facemask.study import open_study

name, storage = os.environ.get("SWEEP"), os.environ.get("SWEEP_STORAGE")
if name is None:
    name, scratch = "deit", mkdtemp()
    storage = f"sqlite:///{scratch}/study.db"
    options = "sweep=deit model=deit sweep.trials=4 logger=none threads=1 data.num_images=300 data.batch_size=16"
    options += " model.img_size=32 model.depth=2 trainer.max_epochs=3 evaluate.resamples=100"
    places = [f"sweep.folder={scratch}", f"cache_dir={scratch}/cache", f"ledger={scratch}/ledger.jsonl"]
    subprocess.run([sys.executable, "sweep.py", *options.split(), *places], cwd=ROOT, check=True, capture_output=True)
study = open_study(name, storage)
pd.Series([trial.state.name for trial in study.trials]).value_counts()

# %% [markdown]
# ## Trials, the best first

# %% tags=["varies"]
best, objectives = ranked(study), study.metric_names or ["value"]
pd.DataFrame([{"trial": t.number, **dict(zip(objectives, t.values, strict=True)), **t.params} for t in best]).round(5)

# %% [markdown]
# ## Which parameters matter
#
# The share of the variance that a parameter explains (fANOVA), and every trial as a line. Four trials show how to read
# the figures, and nothing else: a search that says something has thirty or more.

# %% tags=["varies"]
if importance := importance_of(study, 0):
    bars(importance, plt.figure(figsize=(7, 0.8 + 0.3 * len(importance)), layout="constrained"), "C0", "0.6")
if len(best) > 1:
    params = list(dict.fromkeys(key for trial in best for key in trial.params))
    figure = plt.figure(figsize=(8, 3.2), layout="constrained")
    parallel(best, params, objectives, -(-len(best) // 5), figure, "C0", "0.6")
plt.show()

# %% [markdown]
# `facemask sweep show NAME` writes all of it as one page; `facemask sweep finish NAME` trains the best again on fresh
# seeds and opens the test split once.
