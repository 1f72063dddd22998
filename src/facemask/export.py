"""A run's model for other libraries, kept only where it decides as the run does on every picture of its evaluation.

Each folder holds the weights (safetensors or ONNX, no pickles), what the library needs to prepare a picture and to name
the classes, verification.json, the model card and the licence. Labels are not looked at: the test split is not opened.
"""

import copy
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import runpy
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import split_model_name_tag
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from facemask import card, onnx_input
from facemask.config import ROOT
from facemask.data.datamodule import ImageData
from facemask.errors import UserError
from facemask.evaluate import OTHER, compose_evaluation, console, load_run, own_pictures
from facemask.evaluate import build_data as evaluation_data
from facemask.files import write_json, write_text
from facemask.modeling.classifier import Classifier
from facemask.runs.folder import RunFolder
from facemask.runs.page import Cell, text_table

NEEDS = {
    "timm": [],
    "hf": ["transformers"],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "onnx-int8": ["onnx", "onnxscript", "onnxruntime"],
}
MOST_DIFFERENCE = 1e-4  # of a logit, from the same tensor in fp32; then no decision may differ either
MOST_FLIPS = 0.005  # share of decisions: from files through the library's own preprocessing, and of int8
ROUNDS = 30
OPSET = 18
FP32 = "fp32.onnx"


@dataclass(frozen=True)
class Source:
    """What is exported: the reported head of a run's model and the view that it sees."""

    classifier: Classifier
    classes: list[str]
    img_size: int
    crop_pct: float

    @property
    def network(self) -> Any:
        return self.classifier.backbone.network

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of pixels / 255, by channel."""
        mean, std = (getattr(self.classifier.backbone, name).flatten() / 255 for name in ("mean", "std"))
        return [round(x, 7) for x in mean.tolist()], [round(x, 7) for x in std.tolist()]

    @property
    def short_side(self) -> int:
        """Pixels to which a picture is resized before its centre is taken."""
        return int(self.img_size / self.crop_pct)

    @property
    def head(self) -> str:
        if len(self.classifier.heads) > 1:
            return "The logits are the mean of the class head's and the distillation head's, as the run reports them."
        name = {"head": "class", "head_dist": "distillation"}[self.classifier.reported_head]
        return f"The logits are those of the {name} head, the only one that was trained."

    def plain_network(self) -> Any:
        """The timm network whose own output is the reported head's.

        With a distillation token timm and transformers give the mean of both heads. Where one alone was trained, it is
        doubled and the other made zero, which loses no bit.
        """
        network = copy.deepcopy(self.network)
        if self.classifier.backbone.has_token and len(self.classifier.heads) == 1:
            with torch.no_grad():
                for name in ("head", "head_dist"):
                    for parameter in getattr(network, name).parameters():
                        parameter.mul_(2.0 if name in self.classifier.heads else 0.0)
        return network


class Reported(nn.Module):
    """Normalised float (B, 3, H, W) -> logits (B, C) of the reported head."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.classifier.backbone.from_normalised(images)
        return self.classifier.head_logits(outputs)[self.classifier.reported_head]


@dataclass(frozen=True)
class Loaded:
    """An export as its library reads it: logits (B, C) of normalised float (B, 3, H, W), and the class of a file."""

    logits: Callable[[Tensor], np.ndarray]
    decide: Callable[[Image.Image], str]
    preprocessing: str
    file: str


def view(source: Source) -> dict[str, Any]:
    """What the model must be given, as timm describes it; transformers reads this too."""
    mean, std = source.statistics
    original = source.network.pretrained_cfg
    return {
        "input_size": [3, source.img_size, source.img_size],
        "fixed_input_size": bool(original.get("fixed_input_size")),
        "interpolation": "bicubic",
        "crop_pct": source.crop_pct,
        "crop_mode": "center",
        "mean": mean,
        "std": std,
        "num_classes": len(source.classes),
        "first_conv": original["first_conv"],
        "classifier": original["classifier"],
        "custom_load": False,
        "license": "apache-2.0",
    }


# -- timm -------------------------------------------------------------------------------------------------------


def write_timm(folder: Path, source: Source) -> None:
    """config.json and model.safetensors for `timm.create_model("local-dir:DIR", pretrained=True)`.

    Raises:
        UserError: a network that timm cannot build from its name and numbers.
    """
    model = source.classifier.hparams["model"]
    if model.get("patch_embed", "linear") != "linear":
        raise UserError(
            f"timm cannot build a model with patch_embed={model['patch_embed']} from its name: use --to onnx"
        )
    arguments = {"img_size": source.img_size} if hasattr(source.network, "patch_embed") else {}
    config = {
        "architecture": split_model_name_tag(model["name"])[0],
        "num_classes": len(source.classes),
        "num_features": source.network.num_features,
        "label_names": source.classes,
        "model_args": {**arguments, **({"depth": model["depth"]} if model.get("depth") else {})},
        "pretrained_cfg": view(source),
    }
    write_json(folder / "config.json", config)
    _save(folder, source.plain_network().state_dict())


def load_timm(folder: Path) -> Loaded:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform: Any = create_transform(**resolve_model_data_config(model))
    names = model.pretrained_cfg["label_names"]

    def decide(image: Image.Image) -> str:
        return names[int(model(transform(image.convert("RGB"))[None]).argmax())]

    return Loaded(lambda images: model(images).numpy(), decide, "timm.data.create_transform", "model.safetensors")


# -- transformers -----------------------------------------------------------------------------------------------

_NAMES = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm": "layernorm",
}
_HEADS = {"vit": {"head": "classifier"}, "deit": {"head": "cls_classifier", "head_dist": "distillation_classifier"}}


def hugging_face_weights(network: Any, kind: str) -> dict[str, Tensor]:
    """Tensors of a timm vision transformer by the names that transformers stores for `kind`, "vit" or "deit".

    Raises:
        KeyError: a tensor that the classes of transformers have no place for.
    """
    named: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        found: Any = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", key)
        block, name, part = found[1], found[2], found[3] or ""
        place = kind + (f".encoder.layer.{block}." if block else ".")
        if name == "attn.qkv":
            for third, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[f"{place}attention.attention.{third}{part}"] = rows
        else:
            named[(_HEADS[kind].get(name) or place + _NAMES[name]) + part] = value
    return named


def write_hugging_face(folder: Path, source: Source) -> None:
    """config.json, preprocessor_config.json and model.safetensors for ViTForImageClassification, or
    DeiTForImageClassificationWithTeacher where there is a distillation token.

    Raises:
        UserError: a network that these two classes cannot hold.
    """
    from transformers import DeiTConfig, ViTConfig

    network = source.plain_network()
    kind = "deit" if isinstance(network, VisionTransformerDistilled) else "vit"
    other = "onnx" if source.classifier.hparams["model"].get("patch_embed", "linear") != "linear" else "timm"
    refused = UserError(
        f"transformers' ViT and DeiT classes cannot hold this {type(network).__name__} "
        f"({source.classifier.hparams['model']['name']}): use --to {other}"
    )
    # other pooling, other kinds of attention or MLP, register tokens, a CNN before the blocks
    plain = type(network) in (VisionTransformer, VisionTransformerDistilled)
    if not plain or network.global_pool != "token" or network.num_prefix_tokens != (2 if kind == "deit" else 1):
        raise refused
    try:
        weights = hugging_face_weights(network, kind)
    except KeyError as error:
        raise refused from error
    first = network.blocks[0]
    config_class: Any = DeiTConfig if kind == "deit" else ViTConfig
    config = config_class(
        hidden_size=network.embed_dim,
        num_hidden_layers=len(network.blocks),
        num_attention_heads=first.attn.num_heads,
        intermediate_size=first.mlp.fc1.out_features,
        layer_norm_eps=network.norm.eps,
        qkv_bias=first.attn.qkv.bias is not None,
        image_size=source.img_size,
        patch_size=network.patch_embed.patch_size[0],
        id2label=dict(enumerate(source.classes)),
        label2id={name: i for i, name in enumerate(source.classes)},
        architectures=["DeiTForImageClassificationWithTeacher" if kind == "deit" else "ViTForImageClassification"],
        image_processor_type="TimmWrapperImageProcessor",
        pretrained_cfg=view(source),
    )
    config.save_pretrained(folder)
    # transformers' other image processors crop one pixel elsewhere in every fourth picture: config.json names timm's,
    # and this file is for ViTImageProcessor.from_pretrained(folder), which needs no timm.
    mean, std = source.statistics
    processor: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": std}
    processor |= {"do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": source.short_side}}
    processor |= {"resample": int(Image.Resampling.BICUBIC), "do_rescale": True, "rescale_factor": 1 / 255}
    processor |= {"do_normalize": True}
    crop = {"height": source.img_size, "width": source.img_size}
    write_json(folder / "preprocessor_config.json", {**processor, "do_center_crop": True, "crop_size": crop})
    _save(folder, weights)


def load_hugging_face(folder: Path) -> Loaded:
    from transformers import AutoModelForImageClassification, pipeline
    from transformers.utils import logging as hints

    hints.set_verbosity_error()
    hints.disable_progress_bar()
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    classify = pipeline("image-classification", str(folder), device="cpu")

    def decide(image: Image.Image) -> str:
        return classify(image, top_k=1)[0]["label"]

    def logits(images: Tensor) -> np.ndarray:
        return model(pixel_values=images).logits.numpy()

    return Loaded(logits, decide, "transformers.pipeline", "model.safetensors")


# -- ONNX -------------------------------------------------------------------------------------------------------


def write_onnx(folder: Path, source: Source) -> None:
    """model.onnx (one file, any batch), preprocess.py, and preprocessing.json with the view and the classes."""
    import onnx

    example = torch.zeros(2, 3, source.img_size, source.img_size)
    file = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Reported(source.classifier),
            (example,),
            file,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    model = onnx.load(file)
    del model.graph.value_info[:]  # shapes of the example, which the quantiser would take for everybody's
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    mean, std = source.statistics
    view = {"resize_short_side": source.short_side, "resampling": "bicubic", "crop": source.img_size}
    write_json(folder / "preprocessing.json", {"classes": source.classes, **view, "mean": mean, "std": std})
    shutil.copyfile(onnx_input.__file__, folder / "preprocess.py")


def write_int8(folder: Path, source: Source) -> None:
    """As `write_onnx`, with the weights of matrices in int8 by channel; beside it, as FP32, the model in fp32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    write_onnx(folder, source)
    whole = (folder / "model.onnx").rename(folder / FP32)
    quantize_dynamic(
        whole, folder / "model.onnx", op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
        weight_type=QuantType.QInt8,
    )  # fmt: skip


def load_onnx(folder: Path, file: str = "model.onnx") -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
    prepare = runpy.run_path(str(folder / "preprocess.py"))["prepare"]
    classes = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))["classes"]

    def logits(images: Tensor) -> np.ndarray:
        return session.run(None, {"pixel_values": images.numpy()})[0]

    def decide(image: Image.Image) -> str:
        return classes[int(session.run(None, {"pixel_values": prepare(image)})[0].argmax())]

    return Loaded(logits, decide, "preprocess.py of the folder", file)


# -- the comparison ---------------------------------------------------------------------------------------------


def pictures(run_dir: Path, run: Any, classes: list[str], overrides: list[str]) -> tuple[ImageData, list[str]]:
    """The pictures that an export is compared on, and their splits."""
    cfg, own = compose_evaluation(run, overrides)
    if own:
        return own_pictures(run_dir, run, cfg, cfg.evaluate.splits), list(cfg.evaluate.splits)
    data = evaluation_data(cfg.data)
    data.prepare_whole(OTHER, classes, {})
    return data, [OTHER]


@torch.inference_mode()
def verify(
    source: Source, loaded: Loaded, data: ImageData, splits: Sequence[str], whole_precision: bool
) -> dict[str, Any]:
    """How far an export is from the run on every picture, and whether that is near enough."""
    reported = Reported(source.classifier)
    largest, tensor_flips, file_flips, count = 0.0, 0, [], 0
    for split in splits:
        paths, loader = iter(data.table.iloc[data.rows(split)]["path"]), data.eval_loader(split, 32)
        for batch in track(loader, f"comparing {split}", total=len(loader), console=console, transient=True):
            images = normalised(source, batch["pixels"])
            own, theirs = reported(images).numpy(), loaded.logits(images)
            decided = own.argmax(axis=1)
            largest = max(largest, float(np.abs(own - theirs).max()))
            tensor_flips += int((decided != theirs.argmax(axis=1)).sum())
            count += len(images)
            for row in decided:
                path = next(paths)
                if loaded.decide(Image.open(io.BytesIO(data.read(path)))) != source.classes[row]:
                    file_flips.append(path)
    most = int(MOST_FLIPS * count)
    checks: dict[str, list[float]] = {
        **({"largest_logit_difference": [largest, MOST_DIFFERENCE]} if whole_precision else {}),
        "flips_from_the_same_tensor": [tensor_flips, 0 if whole_precision else most],
        "flips_from_files": [len(file_flips), most],
    }
    return {
        "passed": all(found <= limit for found, limit in checks.values()),
        "pictures": count,
        "splits": list(splits),
        "largest_logit_difference": largest,
        "checks": {name: {"found": found, "allowed": limit} for name, (found, limit) in checks.items()},
        "preprocessing": loaded.preprocessing,
        "files_decided_otherwise": file_flips,
    }


def normalised(source: Source, pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> what the network is given."""
    backbone = source.classifier.backbone
    return (pixels - backbone.mean) / backbone.std


@torch.inference_mode()
def latency(source: Source, models: dict[str, Callable[[Tensor], Any]]) -> dict[str, float]:
    """Median milliseconds of one picture, the models in turn."""
    image = torch.zeros(1, 3, source.img_size, source.img_size)
    took: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            model(image)
            took[name].append(1000 * (time.perf_counter() - start))
    return {name: round(statistics.median(times), 3) for name, times in took.items()}


def export(run_dir: Path, to: str, out: Path, overrides: list[str]) -> bool:
    """Write `out` and compare it with the run; where they differ too much nothing is kept.

    Args:
        run_dir: of a finished run.
        to: one of `NEEDS`.
        overrides: as of `facemask evaluate`: data=... compares on other pictures than the run's own.

    Returns: whether the folder was kept.

    Raises:
        UserError: whatever the user can mend, before anything is written.
    """
    if missing := [name for name in NEEDS[to] if importlib.util.find_spec(name) is None]:
        raise UserError(f"--to {to} needs {', '.join(missing)}: pip install 'facemask[export]'")
    if out.exists():
        raise UserError(f"{out} exists already and is not overwritten: choose another --out")
    if RunFolder(run_dir).status().get("state") != "finished":
        raise UserError(f"{run_dir} holds no finished run: finish it with resume=true, or name another folder")
    run, classifier, classes = load_run(run_dir)
    source = Source(classifier, classes, run.data.img_size, run.data.crop_pct)
    _quiet()
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    writers = {"timm": write_timm, "hf": write_hugging_face, "onnx": write_onnx, "onnx-int8": write_int8}
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as made:
        scratch = Path(made) / out.name
        scratch.mkdir()
        writers[to](scratch, source)
        data, splits = pictures(run_dir, run, classes, overrides)
        loaded = {"timm": load_timm, "hf": load_hugging_face}.get(to, load_onnx)(scratch)
        facts = {"to": to, "head": source.head, **verify(source, loaded, data, splits, to != "onnx-int8")}
        in_turn: dict[str, Callable[[Tensor], Any]] = {
            "this project": Reported(classifier),
            "the export": loaded.logits,
        }
        sizes = {"the export": loaded.file}
        if to == "onnx-int8":
            in_turn["ONNX in fp32"], sizes["ONNX in fp32"] = load_onnx(scratch, FP32).logits, FP32
        facts["milliseconds_per_picture"] = latency(source, in_turn)
        facts["megabytes"] = {name: round((scratch / file).stat().st_size / 1e6, 1) for name, file in sizes.items()}
        facts["threads"] = torch.get_num_threads()
        facts["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "timm", *NEEDS[to])}
        _print(facts)
        if not facts["passed"]:
            console.print(f"refused   the export differs too much from {run_dir}: nothing was kept")
            return False
        write_json(scratch / "verification.json", facts)
        write_text(scratch / "README.md", card.card(run_dir, data.cache_dir, facts))
        shutil.copyfile(ROOT / "LICENSE", scratch / "LICENSE")
        (scratch / FP32).unlink(missing_ok=True)
        scratch.replace(out)
    console.print(f"written   {out}: {source.head}")
    return True


def _print(facts: dict[str, Any]) -> None:
    through = {"flips_from_files": f" through {facts['preprocessing']}"}
    rows: list[list[Cell]] = [
        [name.replace("_", " ") + through.get(name, ""), f"{check['found']:.3g}", f"{check['allowed']:.3g}"]
        for name, check in facts["checks"].items()
    ]
    for what in ("milliseconds_per_picture", "megabytes"):
        rows += [[f"{what.replace('_', ' ')}: {name}", f"{value:.1f}", ""] for name, value in facts[what].items()]
    caption = f"{facts['to']}, {facts['pictures']:,} pictures of {', '.join(facts['splits'])}"
    console.print(text_table(["", "found", "allowed"], rows, caption))


def _save(folder: Path, tensors: dict[str, Tensor]) -> None:
    whole = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


def _quiet() -> None:
    """Nothing is looked for on the hub, and the libraries' progress and hints do not bury the result."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("onnxscript", "onnx_ir", "torch.onnx", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
