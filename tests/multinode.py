"""Two machines, really: two network namespaces that only a veth pair joins, and `torchrun --nnodes 2` over gloo.

`make test-multinode`, as root. Trains and evaluates as one process does; then the link is cut in the middle: both
machines end within a minute, and the run goes on from its last checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from ranks_tools import ROOT, SMALL, TORCHRUN, environment, wait_for

from facemask.runs.predictions import read_predictions

OPTIONS = [*SMALL, "trainer.precision=32-true", "model.drop_path_rate=0", "model=deit", "distill=logit"]
TWO = ["trainer=ddp_cpu", "trainer.devices=1", "trainer.num_nodes=2"]
ADDRESS = "10.213.7."


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


class Machines:
    """Two namespaces, joined by a link that can be cut."""

    def __init__(self) -> None:
        self.names = [f"facemask{os.getpid()}{side}" for side in "ab"]
        self.links = [f"fm{os.getpid()}{side}" for side in "ab"]

    def __enter__(self) -> "Machines":
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True), 1):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{ADDRESS}{number}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            ip("netns", "del", name, check=False)

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.links[1], "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", self.links[1], "up")

    def torchrun(self, folder: Path, *options: str) -> list[tuple[subprocess.Popen, Path]]:
        """Start train.py on both machines, as a user does; what each prints goes to a file."""
        started = []
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            log = folder / f"machine{number}.log"
            command = ["ip", "netns", "exec", name, *TORCHRUN, "--nnodes=2", f"--node-rank={number}"]
            command += ["--nproc-per-node=1", f"--master-addr={ADDRESS}1", "--master-port=29500"]
            with log.open("w") as file:
                process = subprocess.Popen(
                    [*command, str(ROOT / "train.py"), *options],
                    env=environment(GLOO_SOCKET_IFNAME=link), stdout=file, stderr=file,
                )  # fmt: skip
            started.append((process, log))
        return started


def finish(machines: list[tuple[subprocess.Popen, Path]]) -> str:
    for process, log in machines:
        assert process.wait(300) == 0, log.read_text()[-5000:]
    return "".join(log.read_text() for _, log in machines)


def results(run: Path) -> tuple[np.ndarray, pd.DataFrame]:
    losses = pd.read_csv(run / "curves.csv")["train/loss_step"].dropna().to_numpy()
    return losses, read_predictions(run / "predictions.parquet")[0]


def check(folder: Path) -> None:
    def own(name: str, *more: str) -> list[str]:
        places = [f"run_dir={folder}/{name}", f"cache_dir={folder}/cache", f"ledger={folder}/{name}.jsonl"]
        return [*OPTIONS, *places, "callbacks.last.every_n_train_steps=2", *more]

    with Machines() as machines:
        finish(machines.torchrun(folder, *own("two", "trainer.max_epochs=4"), *TWO))
        command = [sys.executable, str(ROOT / "train.py"), *own("one", "trainer.max_epochs=4")]
        subprocess.run(command, env=environment(), check=True, capture_output=True)
        (one, by_one), (two, by_two) = results(folder / "one"), results(folder / "two")
        np.testing.assert_allclose(two, one, rtol=1e-3)
        pd.testing.assert_frame_equal(by_two, by_one, rtol=1e-4, atol=1e-4)
        print(f"two machines: losses of {len(one)} steps within {np.abs(two / one - 1).max():.1e} of one process, "
              f"{len(by_two)} pictures evaluated once each", flush=True)  # fmt: skip

        long = own("cut", "trainer.max_epochs=60", "resume=true")
        started = machines.torchrun(folder, *long, *TWO)
        checkpoint = folder / "cut/checkpoints/last.ckpt"
        wait_for(checkpoint.exists, started[0][0], started[0][1])
        machines.cut()
        begin = time.monotonic()
        codes = [process.wait(60) for process, _ in started]
        took = time.monotonic() - begin
        for number, (_, log) in enumerate(started):
            told = [line for line in log.read_text().splitlines() if line.startswith("error:")]
            assert len(told) == 1, log.read_text()[-5000:]
            assert "cannot be reached any more" in told[0]
            assert codes[number] != 0
        assert json.loads((folder / "cut/status.json").read_text())["state"] == "failed"
        print(f"link cut: both machines ended after {took:.0f} s with one sentence each", flush=True)

        machines.mend()
        finish(machines.torchrun(folder, *long, *TWO))
        losses, frame = results(folder / "cut")
        assert len(losses) == 2 * 60
        assert frame["id"].is_unique
        assert len((folder / "cut.jsonl").read_text().splitlines()) == 1
        print("link mended: the same command went on to the end")


def missing() -> str | None:
    """Why this cannot be tried here."""
    if shutil.which("ip") is None:
        return "the command ip (iproute2) is not here"
    try:
        with Machines():
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces need root with CAP_NET_ADMIN ({error.stderr.decode().strip()})"


if __name__ == "__main__":
    if reason := missing():
        print(f"skipped: {reason}")
        sys.exit(0)
    with tempfile.TemporaryDirectory() as scratch:
        check(Path(scratch))
