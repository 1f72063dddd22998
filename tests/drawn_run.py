"""A finished run on drawn faces, made without training."""

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from hydra import compose, initialize_config_dir

from facemask.config import ROOT, as_plain
from facemask.evaluate import build_data, predict_splits
from facemask.files import write_json, write_text
from facemask.modeling.classifier import Classifier
from facemask.runs import predictions
from facemask.runs.checkpoints import checkpoint_facts, write_checkpoint

DRAWN = ("data=synthetic", "data.num_images=160")


def drawn_run(place: Path, *options: str, data: Sequence[str] = DRAWN, splits: Sequence[str] = ("val",)) -> Path:
    """Run folder of an untrained model of 32 px, by default on 160 drawn faces, whose test split was not opened; its
    caches are in `place/cache`, and it keeps predictions of some splits."""
    run = place / "run"
    given = [*data, "model.img_size=32", "model.depth=1", "distill=none", *options]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*given, f"cache_dir={place / 'cache'}", f"run_dir={run}", "evaluate.resamples=100"])
        config = as_plain(cfg)
    config["ledger"] = str(place / "ledger.jsonl")
    pictures = build_data(config["data"])
    pictures.prepare(splits)
    classifier = Classifier(config["model"], config["distill"], config["optim"], pictures.classes, 0, 64)
    best = run / "checkpoints" / "best.ckpt"
    best.parent.mkdir(parents=True)
    write_checkpoint(best, {"hyper_parameters": dict(classifier.hparams), "state_dict": classifier.state_dict()})
    facts = checkpoint_facts(best)
    write_json(run / "checkpoints.json", {"best.ckpt": facts})
    write_text(run / "config.yaml", yaml.safe_dump(config))
    pictures.table[["path", "label", "split", "group", "sha256", "bytes"]].to_csv(run / "split.csv", index=False)
    write_json(run / "provenance.json", {"fingerprint": pictures.fingerprint})
    frame, _ = predict_splits(classifier, None, pictures, splits, 64, torch.device("cpu"))
    predictions.write_predictions(run / "predictions.parquet", frame, pictures.classes)
    summary = {"name": "a run", "reported_head": classifier.reported_head, "weights_sha256": facts["weights_sha256"]}
    write_json(run / "summary.json", {**summary, "distillation": {}, "test_opened": 0})
    write_json(run / "status.json", {"state": "finished"})
    return run
