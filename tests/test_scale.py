"""Several processes train what one trains, evaluate every picture once, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from ranks_tools import ROOT, SMALL, TORCHRUN, environment, wait_for

from facemask import devices, evaluate, gpu_check
from facemask.errors import UserError
from facemask.ranks import Ranks
from facemask.runs.predictions import read_predictions


def finish(command: list[str], **more: str) -> str:
    result = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Nothing random in the student, fp32, whole batches; 2 pictures to validate with and 7 to test."""
    cache = tmp_path_factory.mktemp("scale")
    exact = ["trainer.precision=32-true", "model.drop_path_rate=0", "data.split_ratios=[0.8,0.05,0.15]"]
    exact += ["data.num_images=47", "data.batch_size=6", "trainer.max_epochs=9", "model=deit", "distill=logit"]
    return [*SMALL, *exact, f"cache_dir={cache}"]


def losses(folder: Path) -> np.ndarray:
    return pd.read_csv(folder / "curves.csv")["train/loss_step"].dropna().to_numpy()


@pytest.mark.slow
def test_two_and_three_processes_train_and_evaluate_as_one_does(options, tmp_path, monkeypatch):
    def own(name: str) -> list[str]:
        return [*options, f"ledger={tmp_path}/{name}.jsonl"]

    train = str(ROOT / "train.py")
    said = finish([sys.executable, train, *own("1"), f"run_dir={tmp_path}/1"])
    assert "learning rate 9.38e-05 (0.001 per 64 images, linear)" in said
    launcher = ["hydra/launcher=submitit_local", f"hydra.sweep.dir={tmp_path}/2"]
    finish([sys.executable, train, *launcher, *own("2"), "trainer=ddp_cpu"])
    three = [*own("3"), "trainer=ddp_cpu", "trainer.devices=3", "name=three"]
    work = tmp_path / "three"
    work.mkdir()
    monkeypatch.chdir(work)  # the run's folder has the time in its name, which each rank reads for itself
    finish([*TORCHRUN, "--nproc-per-node=3", train, *three])
    (folder,) = work.glob("runs/three/*")
    folders = [tmp_path / "1", tmp_path / "2" / "0", folder]

    one, *others = [losses(path) for path in folders]
    assert len(one) == 54
    for other in others:
        np.testing.assert_allclose(other[:10], one[:10], rtol=1e-4)
        np.testing.assert_allclose(other, one, rtol=1e-3)
    frames = [read_predictions(path / "predictions.parquet")[0].set_index("id") for path in folders]
    assert frames[0]["split"].value_counts().to_dict() == {"test": 7, "val": 2}
    for frame, name in zip(frames, "123", strict=True):
        assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) == 1  # the test split was opened once
        pd.testing.assert_frame_equal(frame, frames[0], rtol=1e-3, atol=1e-3)
        assert frame.index.is_unique
    provenance = [json.loads((path / "provenance.json").read_text()) for path in folders]
    assert [part["hardware"]["processes"] for part in provenance] == [1, 2, 3]
    for path in folders:
        assert {file.name for file in path.iterdir() if file.is_dir()} == {"checkpoints"}

    # What `facemask bench gpu` asks on GPUs, of these runs
    verdict = gpu_check.exactness(lambda name, *_: folders[name == "two"], "cpu")
    assert verdict["holds"]
    assert f"in {len(one)}, logits of 9 pictures" in verdict["sentence"]
    assert gpu_check.determinism(lambda name: folders[0])["holds"]
    assert not gpu_check.determinism(lambda name: folders[name == "second"])["holds"]
    assert gpu_check.agreement(None, "32-true")["holds"] is None


def test_evaluation_is_the_same_bits_on_any_number_of_ranks(monkeypatch):
    """Threads stand for ranks."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (23, 3, 8, 8), dtype=np.uint8))

    class Student(torch.nn.Module):
        heads = ("head",)

        def forward(self, pixels):
            # What a picture gets depends on its batch, as the rounding of real kernels does.
            return {"head": pixels.float().mean((2, 3))[:, :2] + pixels.float().std() * 1e-6}

    class Data:
        classes = ("a", "b")
        table = pd.DataFrame(
            {"path": [f"{n:02d}" for n in range(23)], "split": "test", "group": 0, "label": ["a", "b"] * 11 + ["a"]}
        )

        def rows(self, split):
            return np.arange(23)

        def eval_loader(self, split, batch_size, rank=0, world_size=1):
            starts = list(range(0, 23, batch_size))[rank::world_size]
            return [{"pixels": pixels[start : start + batch_size]} for start in starts]

    def predict(world: int) -> pd.DataFrame:
        shared, barrier, frames = [None] * world, threading.Barrier(world), [None] * world
        here = threading.local()

        def gather(target, own):
            shared[here.rank] = own
            barrier.wait()
            target[:] = shared

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)

        def rank(number: int) -> None:
            here.rank = number
            frames[number] = evaluate.predict_splits(
                Student(), None, Data(), ["test"], 4, torch.device("cpu"), (number, world)
            )[0]

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return frames[0]

    alone = predict(1)
    for world in (2, 3, 9):  # of 9 ranks three have no picture
        pd.testing.assert_frame_equal(predict(world), alone, check_exact=True)


@pytest.mark.slow
def test_a_lost_rank_ends_all_and_the_run_goes_on_with_another_number(options, tmp_path):
    long = [*options, "trainer.max_epochs=20", "callbacks.last.every_n_train_steps=4"]
    long += ["+trainer.check_val_every_n_epoch=20"]
    last = tmp_path / "run/checkpoints/last.ckpt"
    own = [f"run_dir={tmp_path}/run", f"ledger={tmp_path}/ledger"]
    command = [sys.executable, str(ROOT / "train.py"), *long, *own]
    for number, victim in enumerate(("child", "main")):
        log = tmp_path / f"log{number}"
        with log.open("w") as file:
            main = subprocess.Popen(
                [*command, "trainer=ddp_cpu", *(["resume=true"] if number else [])],
                env=environment(), stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        before = last.stat().st_mtime_ns if last.exists() else 0
        wait_for(lambda before=before: last.exists() and last.stat().st_mtime_ns > before, main, log)
        children = subprocess.run(
            ["pgrep", "-P", str(main.pid), "-f", "train.py"], capture_output=True, text=True, check=True
        )
        child = int(children.stdout.split()[0])
        os.kill(child if victim == "child" else main.pid, signal.SIGKILL)
        start = time.monotonic()
        code = main.wait(60)
        while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
            assert time.monotonic() - start < 60
            time.sleep(0.2)
        text = log.read_text()
        assert text.count("error:") == text.count("one of the 2 processes of this run ended") == 1, text[-3000:]
        assert "Traceback" not in text
        if victim == "child":
            assert code == 1
            assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert 0 < torch.load(last, "cpu", weights_only=True)["global_step"] < 120
    said = finish([*command, "resume=true"])
    assert "Resumed with 1 process instead of 2: every step has the same pictures, but" in said
    assert losses(tmp_path / "run").size == 120
    assert len((tmp_path / "ledger").read_text().splitlines()) == 1


@pytest.mark.slow
def test_ranks_with_different_jobs_stop_before_the_first_step(options, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
    ranks = []
    for rank in (0, 1):
        own = [f"run_dir={tmp_path}/run", f"optim.lr=0.00{rank + 1}", "trainer=ddp_cpu", f"ledger={tmp_path}/ledger"]
        env = environment(**variables, RANK=str(rank), LOCAL_RANK=str(rank))
        command = [sys.executable, str(ROOT / "train.py"), *options, *own]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    errors = re.findall(r"error.*", "".join(said))
    assert errors == [
        "error: rank 1 was started with another job than rank 0 (optim.lr differ): "
        "start all ranks with the same command on the same pictures"
    ]
    assert not (tmp_path / "run" / "curves.csv").exists()


def test_what_machines_keep_elsewhere_is_no_other_job():
    config = {"run_dir": "/a/run", "cache_dir": "/a/cache", "seed": 0, "callbacks": {"last": {"dirpath": "/a/run/x"}}}
    other = json.loads(json.dumps(config).replace("/a/", "/b/"))
    assert Ranks(config, "f", None).job == Ranks(other, "f", None).job
    assert Ranks(config, "f", None).job != Ranks(config, "g", None).job
    assert Ranks(config, "f", None).job != Ranks({**config, "seed": 1}, "f", None).job


def test_torchrun_of_a_multirun_is_refused():
    command = [sys.executable, str(ROOT / "train.py"), "-m", "seed=0,1"]
    env = environment(TORCHELASTIC_RUN_ID="x", RANK="0", LOCAL_RANK="0")
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "torchrun starts the ranks of one job: leave out -m" in result.stderr


def test_slurm_needs_a_cluster():
    command = [sys.executable, str(ROOT / "train.py"), "hydra/launcher=submitit_slurm", "trainer=ddp"]
    command += ["trainer.num_nodes=2"]
    env = environment(PATH="/nowhere")
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "needs sbatch, which is not here" in result.stderr or "needs the extra slurm" in result.stderr


@pytest.mark.parametrize(("batch_size", "world_size", "sentence"), [
    (8, 3, "data.batch_size=8 is shared by 3 processes: choose a multiple of 3"),
    (8, 4, "3 training pictures are too few for 4 processes"),
])  # fmt: skip
def test_shares_that_cannot_be_equal_are_refused(batch_size, world_size, sentence):
    from facemask.data.datamodule import ImageData

    class Three:
        rows = staticmethod(lambda split: [0, 1, 2])

    Three.batch_size = batch_size
    with pytest.raises(UserError, match=sentence):
        ImageData.check_shares(Three(), world_size)


def test_without_a_gpu_the_check_of_gpus_is_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="torch sees no GPU here, so there is nothing to check"):
        gpu_check.gpu_check(Path("unused"), "gpu", "tiny", 32, 6)


@pytest.mark.slow
def test_the_check_of_gpus_runs_as_a_whole_on_a_cpu(tmp_path, monkeypatch, capsys):
    """One real training stands for all that are compared; that they differ where they do is asked above."""
    asked, train = {}, gpu_check.Runs.__call__

    def once(runs: gpu_check.Runs, name: str, *options: str) -> Path:
        asked[name] = options
        return train(runs, "run", *gpu_check.EXACT)

    monkeypatch.setattr(gpu_check.Runs, "__call__", once)
    file, holds = gpu_check.gpu_check(tmp_path, "cpu", "tiny", 32, 6)
    said, content = capsys.readouterr().out, json.loads(file.read_text())
    assert file.parent.parent == tmp_path / "bench"
    assert content["command"] == "facemask bench gpu --size tiny --side 32 --batch 6"
    checks = content["checks"]
    assert list(checks) == ["throughput", "determinism", "16 bits", "2 devices"]
    fast = checks["throughput"]
    assert fast["ratio"] == pytest.approx(fast["ours_per_s"] / fast["other_per_s"])
    assert fast["holds"] == holds == (fast["ratio"] >= gpu_check.BARE)
    assert checks["determinism"]["holds"]
    assert checks["2 devices"]["losses"] == [0, 0]
    assert "in 55, logits of" in checks["2 devices"]["sentence"]
    assert asked["two"][:2] == ("trainer=ddp_cpu", "trainer.devices=2")
    if devices.native_bf16("cpu"):
        assert asked["16"][-1] == "trainer.precision=bf16-mixed"
    assert all(sentence in said for sentence in ("throughput", "determinism  holds: two runs of one command"))


def test_a_run_of_the_check_that_fails_is_told_with_its_end(tmp_path):
    with pytest.raises(
        UserError, match=r"the run a ended with exit code 2: error: optim\.lr=-1 must be a number above 0"
    ):
        gpu_check.Runs(tmp_path, ["trainer=cpu"])("a", "optim.lr=-1")


def test_a_lost_rank_ends_this_process_though_nothing_can_be_written(monkeypatch):
    ranks = Ranks({"run_dir": "/a"}, "f", on_loss=lambda error: (_ for _ in ()).throw(OSError("No space left")))
    ranks.trainer = SimpleNamespace(world_size=2, global_rank=0, local_rank=0, strategy=SimpleNamespace(launcher=None))

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        ranks.end()


# -- what suits the device ----------------------------------------------------------------------------------------

AUTO = dict.fromkeys(["tf32", "channels_last", "pin_memory", "prefetch", "compile", "gradient_checkpointing"], "auto")


def fake_gpu(monkeypatch, capability: tuple[int, int], bf16: bool, gibibytes: float) -> torch.device:
    properties = type("Properties", (), {"total_memory": gibibytes * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name == "triton")
    return torch.device("cuda")


def test_auto_chooses_what_suits_the_device_and_is_overruled(monkeypatch):
    cpu = devices.choose(AUTO, torch.device("cpu"), 1e12)
    assert [key for key, value in cpu.items() if value] == ["channels_last"]
    assert devices.choose({**AUTO, "compile": True, "channels_last": False}, torch.device("cpu"), 0) == {
        **cpu, "compile": True, "channels_last": False
    }  # fmt: skip
    gpu = fake_gpu(monkeypatch, (9, 0), bf16=True, gibibytes=80)
    chosen = devices.choose(AUTO, gpu, 39 * 2**30)
    assert [key for key, value in chosen.items() if not value] == ["tf32", "gradient_checkpointing"]
    assert devices.choose(AUTO, gpu, 41 * 2**30)["gradient_checkpointing"]
    assert devices.choose({**AUTO, "tf32": True}, gpu, 0)["tf32"]
    assert devices.auto_precision("gpu") == "bf16-mixed"
    fake_gpu(monkeypatch, (7, 5), bf16=False, gibibytes=16)
    assert devices.auto_precision("gpu") == "16-mixed"
    fake_gpu(monkeypatch, (6, 1), bf16=False, gibibytes=11)
    assert devices.auto_precision("gpu") == "32-true"
    assert not devices.choose(AUTO, gpu, 0)["compile"]


def test_activations_of_a_vit_are_counted():
    import timm

    network = timm.create_model("deit_tiny_patch16_224", depth=3, img_size=32)
    # 2 x 2 patches and the class token, 192 channels, 3 blocks, 7 images
    assert devices.activation_bytes(network, 7, "bf16-mixed") == 34 * 5 * 192 * 3 * 7
    assert devices.activation_bytes(network, 7, "32-true") == 2 * 34 * 5 * 192 * 3 * 7
    assert devices.activation_bytes(timm.create_model("resnet10t"), 7, "32-true") == 0


def test_prefetched_batches_are_the_loaders_in_order():
    views = [{"pixels": torch.full((3, 2, 2), n, dtype=torch.uint8), "row": n} for n in range(7)]
    loader = torch.utils.data.DataLoader(views, 2)
    ahead = devices.Prefetched(loader, torch.device("cpu"))
    assert len(ahead) == 4
    assert ahead.sampler is loader.sampler
    assert [batch["row"].tolist() for batch in ahead] == [[0, 1], [2, 3], [4, 5], [6]]
    assert [int(batch["pixels"][0, 0, 0, 0]) for batch in ahead] == [0, 2, 4, 6]
    assert list(devices.Prefetched(torch.utils.data.DataLoader([], 2), torch.device("cpu"))) == []
