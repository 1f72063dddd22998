"""Mistakes of the user: one sentence that names the mend, exit code 2, and no run folder left behind."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["data.batch_size=8", "model.img_size=32", "model.depth=1", "trainer.max_epochs=1", "logger=none"]
DRAWN = ["data.num_images=40"]

# Runs train.py as `python train.py ARGUMENTS` would, once for every list of arguments (one process, because
# importing torch takes longer than all of them together), and tells of each what a shell would have seen.
RUNNER = """
import json, os, runpy, sys, tempfile

if sys.argv[1:] == ["without torch"]:
    sys.modules["torch"] = None  # importing it fails
results = {}
for name, arguments in json.load(sys.stdin).items():
    sys.argv = ["train.py", *arguments]
    kept = [os.dup(1), os.dup(2)]
    files = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    code = 0
    try:
        runpy.run_path("train.py", run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    except BaseException as error:
        code = repr(error)
    sys.stdout.flush(), sys.stderr.flush()
    for number, (file, own) in enumerate(zip(files, kept), 1):
        os.dup2(own, number)
        file.seek(0)
    out, err = (file.read() for file in files)
    results[name] = {"code": code, "out": out, "err": err}
print(json.dumps(results))
"""


def environment(**more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("FACEMASK_", "WANDB_"))}
    return plain | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | more


def run_all(cases: dict[str, list[str]], tmp_path: Path, *options: str) -> dict[str, dict[str, Any]]:
    given = {
        name: [*arguments, *([] if "cache_dir=" in " ".join(arguments) else [f"cache_dir={tmp_path / 'cache'}"])]
        + (
            []
            if any("run_dir=" in a or "run.dir=" in a for a in arguments)
            else [f"run_dir={tmp_path / 'runs' / name}"]
        )
        for name, arguments in cases.items()
    }
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, *options],
        cwd=ROOT,
        env=environment(),
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def check(result: dict[str, Any], sentence: str) -> None:
    assert result["code"] == 2, result
    lines = result["err"].strip().split("\n")
    assert len(lines) == 1, result["err"]
    assert lines[0].startswith("error: ")
    assert re.search(sentence, lines[0]), lines[0]
    assert "Traceback" not in result["out"]


# -- mistakes in the config: torch is not imported, nothing is written ------------------------------------------------

CONFIG: dict[str, tuple[list[str], str]] = {
    "no token": (
        ["model=deit", "distill=hard"],
        r"distill=hard .* deit_tiny_patch16_224 has none: choose model=deit_dist",
    ),
    "no token soft": (["model=vit", "distill=soft"], r"vit_tiny_patch16_224 has none: .* or distill=logit"),
    "no token feature": (["model=deit", "distill=feature"], r"distill/base=logit"),
    "token": (["distill=logit"], r"deit_tiny_distilled_patch16_224 has one: choose distill=soft, or model=deit"),
    "two sizes": (["data.img_size=32"], r"data\.img_size=32 and model\.img_size=64 differ: set model\.img_size"),
    "patch": (["model.img_size=65"], r"model\.img_size=65 is not a multiple of the patch size 16: choose 64 or 80"),
    "patch below": (["model.img_size=8"], r"choose 16 or 32"),
    "stem of 16": (
        ["model=vit", "model.name=vit_tiny_patch8_224", "model.patch_embed=conv_stem"],
        r"conv_stem makes tokens of 16 pixels and vit_tiny_patch8_224 has others",
    ),
    "patch hybrid": (["model.patch_embed=efficientnet_lite0", "model.img_size=48"], r"choose 32 or 64"),
    "lr": (["optim.lr=-1"], r"optim\.lr=-1 must be a number above 0"),
    "lr nothing": (["optim.lr="], r"optim\.lr= must be a number above 0"),
    "lr null": (["optim.lr=null"], r"optim\.lr=null must be a number above 0"),
    "lr text": (["optim.lr=fast"], r"optim\.lr=fast must be a number above 0"),
    "lr infinite": (["optim.lr=inf"], r"optim\.lr=inf must be a number above 0"),
    "lr nan": (["optim.lr=nan"], r"optim\.lr=nan must be a number above 0"),
    "alpha": (["distill.alpha=1.5"], r"distill\.alpha=1\.5 must be a number from 0 to 1"),
    "alpha of the base": (["distill=feature", "distill.base.alpha=-0.1"], r"distill\.base\.alpha=-0\.1 must be"),
    "tau": (["distill=soft", "distill.tau=0"], r"distill\.tau=0 must be a number above 0"),
    "seed": (["seed=-1"], r"seed=-1 must be a whole number of at least 0"),
    "seed null": (["seed=null"], r"seed=null must be a whole number"),
    "seed fraction": (["seed=0.5"], r"seed=0\.5 must be a whole number"),
    "switch": (["model.pretrained=maybe"], r"model\.pretrained=maybe must be true or false"),
    "size null": (["model.img_size=null"], r"model\.img_size=null must be a whole number of at least 1"),
    "name null": (["model.name=null"], r"model\.name=null must be the name of a timm model"),
    "batch": (["data.batch_size=1.5"], r"data\.batch_size=1\.5 must be a whole number of at least 1"),
    "fold": (["data.fold=5"], r"data\.fold=5 must be below data\.folds=5"),
    "noise": (["data.label_noise=1"], r"data\.label_noise=1 must be a number from 0 to below 1"),
    "cache": (["data.cache=raw"], r"data\.cache=raw must be decoded or none"),
    "degrade": (["augment.degrade=2"], r"augment\.degrade=2 must be a number from 0 to 1"),
    "ratios": (["data.split_ratios=[0.5,0.5]"], r"data\.split_ratios=\[0\.5, 0\.5\] must be three shares"),
    "splits": (["evaluate.splits=val"], r"evaluate\.splits=val must be a list .* such as \[val,test\]"),
    "splits none": (["evaluate.splits=[]"], r"evaluate\.splits=\[\] must be a list"),
    "splits null": (["evaluate.splits=null"], r"evaluate\.splits=null must be a list"),
    "splits unknown": (["evaluate.splits=[dev]"], r"evaluate\.splits=\['dev'\] must be a list"),
    "bad file": (["data=folder", "data.on_bad_file=ignore"], r"data\.on_bad_file=ignore must be error or skip"),
    "unknown key": (["foo=1"], r"unknown key foo \(python train\.py --cfg job lists all keys"),
    "unknown key near": (["optim.lrr=1"], r"unknown key optim\.lrr; did you mean optim\.lr\?"),
    "key of another": (["data.root=x"], r"unknown key data\.root; another choice of data= has it"),
    "unknown choice": (["model=resnet"], r"model=resnet does not exist: choose one of deit, deit_distilled, vit$"),
    "unknown recipe": (["recipe=x"], r"recipe=x does not exist: choose one of deit, fast, vit$"),
    "group null": (["logger=null"], r"a config group cannot be null"),
    "syntax": (["optim.lr=["], r"."),
    "no key": (["fast"], r"fast"),
    "interpolation": (["optim.lr=${nowhere}"], r"'nowhere' not found"),
    "two weights": (["model.pretrained=true", "model.checkpoint=x.pth"], r"both name weights: give one of the two"),
    "probe of nothing": (["model.freeze_backbone=true"], r"give model\.pretrained=true or model\.checkpoint=FILE"),
    "device as folder": (["run_dir=/dev/null/run"], r"run_dir=/dev/null/run cannot be written .*: choose another"),
    "file as folder": ([f"run_dir={Path(__file__)}/run"], r"cannot be written .*test_bad_input\.py is not a writable"),
    "file": ([f"run_dir={Path(__file__)}"], r"is not empty and is never overwritten: choose another, or resume=true"),
    "existing": ([f"run_dir={Path(__file__).parent}"], r"is not empty and is never overwritten"),
    "multirun": (
        ["-m", "run_dir=x", "seed=0,1"],
        r"-m gives every job a folder of its own, so run_dir cannot be fixed",
    ),
    "multirun hydra": (["-m", "hydra.run.dir=x", "seed=0,1"], r"run_dir cannot be fixed"),
    "multirun added": (["-m", "++run_dir=x", "seed=0,1"], r"run_dir cannot be fixed"),
}


@pytest.fixture(scope="module")
def config_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("config")
    before = set(ROOT.iterdir()) | set((ROOT / "runs").glob("*"))
    results = run_all({name: arguments for name, (arguments, _) in CONFIG.items()}, folder, "without torch")
    assert list(folder.iterdir()) == []  # no run folder, no cache
    left = (set(ROOT.iterdir()) | set((ROOT / "runs").glob("*"))) - before
    assert not [path for path in left if path.name in ("x", "multirun", "outputs")]
    return results


@pytest.mark.parametrize("name", CONFIG)
def test_config_mistakes(config_results: dict[str, dict[str, Any]], name: str) -> None:
    check(config_results[name], CONFIG[name][1])


@pytest.mark.parametrize("name", ["no token", "unknown key", "multirun"])
def test_config_mistakes_as_a_shell_sees_them(tmp_path: Path, name: str) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *CONFIG[name][0]],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    check({"code": result.returncode, "out": result.stdout, "err": result.stderr}, CONFIG[name][1])
    assert list(tmp_path.iterdir()) == []


# -- mistakes in files and on the machine: before the first training step --------------------------------------------


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (36, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root: Path, **classes: int) -> Path:
    root.mkdir(parents=True)
    for number, (label, count) in enumerate(classes.items()):
        (root / label).mkdir()
        for i in range(count):
            (root / label / f"{i}.png").write_bytes(png(100 * number + i))
    return root


def split_file(folder: Path, lines: list[str]) -> str:
    folder.mkdir(parents=True)
    (folder / "split.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    return str(folder / "split.csv")


def pictures(folder: Path, *options: str, **classes: int) -> list[str]:
    return ["data=folder", f"data.root={tree(folder / 'faces', **classes)}", *options]


def lines(a: str, b: str) -> list[str]:
    """Ten pictures of two classes, splits by their first letters."""
    names = {"r": "train", "v": "val", "e": "test"}
    return [f"{c}/{i}.png,{c},{names[s]}" for c, of in zip("ab", (a, b), strict=True) for i, s in enumerate(of)]


def weights(folder: Path, **changes: Any) -> str:
    """A checkpoint of a network that differs from SMALL's by `changes`."""
    import timm
    from safetensors.torch import save_file

    name = changes.pop("name", "deit_tiny_distilled_patch16_224")
    folder.mkdir(parents=True)
    network = timm.create_model(name, **{"img_size": 32, "depth": 1, "num_classes": 2, **changes})
    save_file(network.state_dict(), folder / "weights.safetensors")
    return f"model.checkpoint={folder / 'weights.safetensors'}"


def file(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    return folder / name


def teacher(folder: Path, classes: list[str]) -> list[str]:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(
        {"x": torch.zeros(1)},
        folder / "teacher.safetensors",
        metadata={"facemask_teacher": json.dumps({"classes": classes})},
    )
    return [*DRAWN, f"teacher.checkpoint={folder / 'teacher.safetensors'}"]


def damaged(folder: Path) -> list[str]:
    overrides = pictures(folder, a=8, b=8)
    (folder / "faces" / "a" / "3.png").write_bytes(png(3)[:900])
    (folder / "faces" / "b" / "5.png").write_bytes(b"no picture")
    return overrides


# name -> (folder for its files -> overrides, the sentence)
FILES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no root": (lambda _: ["data=folder"], r"set data\.root=DIR or the environment variable FACEMASK_DATA"),
    "root missing": (lambda f: ["data=folder", f"data.root={f}/nowhere"], r"data\.root=.+/nowhere does not exist"),
    "root empty": (lambda f: pictures(f), r"holds no pictures .* one sub-folder of pictures per class"),
    "one class": (lambda f: pictures(f, a=5), r"holds one class only \(a\); at least two sub-folders"),
    "one picture": (lambda f: pictures(f, a=1), r"holds one picture only \(a/0\.png\); add pictures"),
    "too few pictures": (lambda f: pictures(f, a=2, b=9), r"class 'a' is too small"),
    "split missing": (
        lambda f: pictures(f, f"data.split={f}/no.csv", a=5, b=5),
        r"data\.split=.+/no\.csv does not exist",
    ),
    "split of absent files": (
        lambda f: pictures(
            f, "data.split=" + split_file(f / "s", [*lines("rrve", "rrve"), "a/9.png,a,train"]), a=5, b=5
        ),
        r"names 1 pictures not in the data folder \(a/9\.png\); mend the paths",
    ),
    "split without a class": (
        lambda f: pictures(f, "data.split=" + split_file(f / "s", lines("rrrve", "vvvee")), a=5, b=5),
        r"has no train picture of the class\(es\) b; add some",
    ),
    "split without val": (
        lambda f: pictures(f, "data.split=" + split_file(f / "s", lines("rrree", "rrree")), a=5, b=5),
        r"has no val picture; add some",
    ),
    "split without test": (
        lambda f: pictures(f, "data.split=" + split_file(f / "s", lines("rrrvv", "rrrvv")), a=5, b=5),
        r"test.*evaluate\.splits|evaluate\.splits.*test",
    ),
    "bad pictures": (
        damaged,
        r"2 picture\(s\) cannot be used: a/3\.png \(truncated\); b/5\.png \(not a JPEG, PNG, WEBP or GIF picture\)",
    ),
    "cache unwritable": (
        lambda _: [*DRAWN, f"cache_dir={Path(__file__)}/cache"],
        r"cache_dir=.+cannot be written \(Not a directory\): choose another with cache_dir=DIR",
    ),
    "ratios": (lambda _: [*DRAWN, "data.split_ratios=[0.5,0.1,0.1]"], r"data\.split_ratios=\[0\.5, 0\.1, 0\.1\] must"),
    "unknown model": (
        lambda _: [*DRAWN, "model.name=deit_huge_distilled_patch16_224"],
        r"deit_huge_distilled_patch16_224",
    ),
    "checkpoint missing": (lambda f: [*DRAWN, f"model.checkpoint={f}/no.pth"], r"no\.pth does not exist"),
    "checkpoint of another width": (
        lambda f: [*DRAWN, weights(f, name="deit_small_distilled_patch16_224")],
        r"weights\.safetensors.*(384|small|size|shape|width)",
    ),
    "checkpoint corrupt": (
        lambda f: [*DRAWN, f"model.checkpoint={file(f, 'a.safetensors', b'x' * 999)}"],
        r"a\.safetensors is not a readable checkpoint",
    ),
    "checkpoint corrupt pth": (
        lambda f: [*DRAWN, f"model.checkpoint={file(f, 'a.pth', b'x' * 999)}"],
        r"a\.pth is not a readable checkpoint",
    ),
    "gpu": (lambda _: [*DRAWN, "trainer=gpu"], r"needs a CUDA device and none is visible: choose trainer=cpu"),
    "ddp": (lambda _: [*DRAWN, "trainer=ddp"], r"needs a CUDA device and none is visible: choose trainer=cpu"),
    "no network": (lambda _: [*DRAWN, "model.pretrained=true"], r"model\.checkpoint=FILE.*hf download"),
    "no network teacher": (lambda _: [*DRAWN, "teacher=timm"], r"regnety_160"),
    "teacher of other classes": (
        lambda f: teacher(f, ["cat", "dog"]),
        r"knows the classes \['cat', 'dog'\] and the data has \['with_mask', 'without_mask'\]",
    ),
    "teacher of another order": (
        lambda f: teacher(f, ["without_mask", "with_mask"]),
        r"knows the classes \['without_mask', 'with_mask'\] .* in this order",
    ),
    "teacher corrupt": (
        lambda f: [*DRAWN, f"teacher.checkpoint={file(f, 't.safetensors', b'x' * 999)}"],
        r"t\.safetensors is no readable teacher file",
    ),
    "teacher missing": (
        lambda f: [*DRAWN, f"teacher.checkpoint={f}/no.safetensors"],
        r"no\.safetensors does not exist",
    ),
    "unknown optimizer": (lambda _: [*DRAWN, "optim.optimizer._target_=torch.optim.Nope"], r"torch\.optim\.Nope"),
    "unknown trainer argument": (lambda _: [*DRAWN, "+trainer.max_epoch=3"], r"max_epoch"),
    "unknown data class": (lambda _: [*DRAWN, "data._target_=nowhere.Data"], r"nowhere"),
    "crossfit": (lambda _: [*DRAWN, "teacher.crossfit=30"], r"too small"),
}


@pytest.fixture(scope="module")
def file_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("files")
    cases = {name: [*SMALL, *make(folder / name)] for name, (make, _) in FILES.items()}
    return {"runs": folder / "runs", **run_all(cases, folder)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_files(file_results: dict[str, Any], name: str) -> None:
    check(file_results[name], FILES[name][1])
    assert not (file_results["runs"] / name).exists()


def test_a_mistake_in_files_as_a_shell_sees_it(tmp_path: Path) -> None:
    overrides = pictures(tmp_path / "given", a=5)
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *SMALL, *overrides, "run_dir=runs/one/two", "cache_dir=cache"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    check({"code": result.returncode, "out": result.stdout, "err": result.stderr}, "holds one class only")
    assert not (tmp_path / "runs" / "one" / "two").exists()
