"""From a checkpoint to the predictions table: every image of a split once, in fp32, whatever training used."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from facemask.data.datamodule import ImageData
from facemask.modeling.classifier import Classifier
from facemask.modeling.teacher import Teacher
from facemask.runs.predictions import add_mean_head, assemble


@torch.inference_mode()
def predict_splits(
    classifier: Classifier,
    teacher: Teacher | None,
    data: ImageData,
    splits: Sequence[str],
    batch_size: int,
    device: torch.device,
) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """Predictions of every picture of some splits, and how long the student took.

    Returns:
        The predictions table (see `facemask.runs.predictions`) with the heads of the student and the teacher's,
        and {split: {"seconds", "images", "steps"}} of the student alone.
    """
    classifier = classifier.eval().to(device).float()
    if teacher is not None:
        teacher.to(device)
    parts, timing = [], {}
    for split in splits:
        collected: dict[str, list[np.ndarray]] = {}
        seconds, steps = 0.0, 0
        for batch in data.eval_loader(split, batch_size):
            pixels = batch["pixels"].to(device)
            start = time.perf_counter()
            outputs: dict[str, Any] = dict(classifier(pixels))
            outputs.pop("mean", None)
            outputs = {head: logits.cpu().numpy() for head, logits in outputs.items()}
            seconds += time.perf_counter() - start
            steps += 1
            if teacher is not None:
                outputs["teacher"] = teacher(pixels).logits.cpu().numpy()
            for head, logits in outputs.items():
                collected.setdefault(head, []).append(logits)
        rows = data.table.iloc[data.rows(split)]
        heads = {head: np.concatenate(logits) for head, logits in collected.items()}
        ids, named, groups, labels = (rows[column].tolist() for column in ("path", "split", "group", "label"))
        parts.append(assemble(ids, named, groups, labels, heads, data.classes))
        timing[split] = {"seconds": seconds, "images": len(rows), "steps": steps}
    frame = pd.concat(parts, ignore_index=True)
    return (add_mean_head(frame, data.classes) if len(classifier.heads) > 1 else frame), timing
