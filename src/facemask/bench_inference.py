"""Inference, as ratios of two things measured in turn: `facemask bench inference RUN DIR`."""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facemask import export
from facemask.bench import asked, in_turn, pairs, rates, show, spread, write_result
from facemask.errors import UserError
from facemask.predict import BATCH, load_model, pictures_below

# How many times as fast as transformers.pipeline: with its defaults, and where batch and precision are equal.
NEEDED = {"defaults": 2.0, "equal": 1.0}


def bench_inference(run: Path, root: Path, pictures: int, rounds: int, latencies: int, out: Path) -> Path:
    """`facemask predict` on files against `transformers.pipeline` on the exported model, on the CPU, and the latency of
    one picture in memory by torch and by ONNX Runtime.

    Args:
        run: run folder, whose weights all of them have.
        root: folder of pictures.
        pictures: at most so many of them, spread over the folder.
        rounds: pairs of measurements per comparison.
        latencies: calls of each engine with one picture.
        out: parent of bench/<machine kind>/inference.json.

    Returns: the JSON file.
    """
    try:
        import onnxruntime  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(f"this comparison needs {error.name}: pip install 'facemask[export]'") from error
    found = pictures_below(str(root))
    if not found:
        raise UserError(f"{root} is no folder with pictures")
    files = [found[i] for i in np.linspace(0, len(found) - 1, min(pictures, len(found))).astype(int)]
    model, exact = (load_model(run, device="cpu", precision=precision) for precision in ("auto", "fp32"))
    bad = {row.source for row in exact.predict(files) if row.problem}
    files = [file for file in files if file not in bad]  # the pipeline stops at the first
    content: dict[str, Any] = {
        "command": f"facemask bench inference RUN DIR --pictures {pictures} --rounds {rounds} --latencies {latencies}",
        "model": exact.classifier.hparams["model"]["name"],
        "img_size": exact.img_size,
        "pictures": len(files),
        "threads": torch.get_num_threads(),
        "predict_computes_in": "fp32" if model.half is None else "bf16, and fp32 where in doubt",
    }
    with tempfile.TemporaryDirectory() as made:
        source = export.Source(exact.classifier, exact.classes, exact.img_size, exact.crop_pct)
        folders = {name: Path(made) / name for name in ("hf", "onnx")}
        for folder in folders.values():
            folder.mkdir()
        export.write_hugging_face(folders["hf"], source)

        # The export names timm's preprocessing, which is exact; this is what a model of transformers' own has.
        processor = transformers.ViTImageProcessor.from_pretrained(folders["hf"])

        def pipe(**options: Any) -> Callable[[], Any]:
            classify = transformers.pipeline(
                "image-classification", str(folders["hf"]), image_processor=processor, device="cpu", **options
            )
            return lambda: [answer[0]["label"] for answer in classify(list(files), top_k=1)]

        def ours(of: Any, batch_size: int = BATCH) -> Callable[[], Any]:
            return lambda: [row.label for row in of.predict(files, batch_size=batch_size)]

        comparisons = [
            ("predict / pipeline, defaults of both", "defaults", ours(model), pipe()),
            ("fp32, batch 1", "equal", ours(exact, 1), pipe(batch_size=1)),
            (f"fp32, batch {BATCH}", "equal", ours(exact), pipe(batch_size=BATCH)),
        ]
        if model.half is not None:
            half = pipe(batch_size=BATCH, dtype=torch.bfloat16)
            comparisons.append((f"bf16, batch {BATCH}", "equal", ours(model), half))
        rows: list[dict[str, Any]] = []
        for what, kind, a, b in comparisons:
            flips = sum(x != y for x, y in zip(a(), b(), strict=True))
            figures = rates(pairs(a, b, rounds), len(files))
            rows.append({"what": what, "needed": NEEDED[kind], **figures, "other_decisions": flips})
        content["comparisons"] = rows

        pixels = torch.from_numpy(np.stack([exact.view(file) for file in files[:64]])).permute(0, 3, 1, 2).contiguous()
        images = export.normalised(source, pixels)
        export.write_int8(folders["onnx"], source)
        whole, small = (export.load_onnx(folders["onnx"], name) for name in (export.FP32, "model.onnx"))
        engines: dict[str, Callable[[int], Any]] = {
            "torch fp32": lambda i: exact.logits(pixels[i : i + 1]),
            "torch bf16": lambda i: model.logits(pixels[i : i + 1], bf16=True),
            "ONNX Runtime fp32": lambda i: whole.logits(images[i : i + 1]),
            "ONNX Runtime int8": lambda i: small.logits(images[i : i + 1]),
        }
        if model.half is None:
            del engines["torch bf16"]
        content["latency"] = _latency(engines, latencies, len(pixels))
    title = f"{content['model']} at {content['img_size']} pixels, {len(files)} files, images/s"
    table = [
        [row["what"], f"{row['ours_per_s']:.1f}", f"{row['other_per_s']:.1f}", *spread(row), asked(row, row["needed"]),
         str(row["other_decisions"])]
        for row in rows
    ]  # fmt: skip
    show(title, ("", "predict", "pipeline", "ratio", "spread", "needed", "other decisions"), table)
    times = [[row["engine"], f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}"] for row in content["latency"]]
    show("latency", ("one picture", "p50, ms", "p95, ms"), times)
    return write_result(content, "inference", out)


def _latency(engines: dict[str, Callable[[int], Any]], calls: int, pictures: int) -> list[dict[str, Any]]:
    """Milliseconds of one picture, the engines in turn."""

    def milliseconds(engine: Callable[[int], Any], calls: Iterator[int]) -> float:
        start = time.perf_counter()
        engine(next(calls) % pictures)
        return 1000 * (time.perf_counter() - start)

    times = in_turn({name: partial(milliseconds, engine, count()) for name, engine in engines.items()}, calls + 5)
    percentiles = {name: np.percentile(of[5:], [50, 95]).tolist() for name, of in times.items()}
    return [{"engine": name, "p50_ms": p50, "p95_ms": p95} for name, (p50, p95) in percentiles.items()]
