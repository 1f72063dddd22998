"""Train, evaluate and report one run: `python train.py model=deit_distilled` (see conf/train.yaml)."""

import hydra
from omegaconf import DictConfig

from facemask.config import command, job


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    from facemask.train import train  # torch is imported only once the config is known to be sound

    job(train, cfg)


if __name__ == "__main__":
    command(main)
