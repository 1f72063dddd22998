"""What stands beside the code: dependencies, citation, and what is tracked."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import facemask

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_conda_takes_its_packages_from_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert environment["dependencies"] == [
        *(f"python{PROJECT['requires-python']}", "pip", "git", "make"),
        {"pip": ["--editable .[dev]"]},
    ]


def test_dev_has_every_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    (own,) = [requirement for requirement in extras["dev"] if requirement.startswith("facemask[")]
    assert own == f"facemask[{','.join(extra for extra in extras if extra != 'dev')}]"


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == PROJECT["name"] == "facemask"
    assert citation["version"] == PROJECT["version"] == facemask.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["message"]
    assert citation["authors"] == [{"name": "The facemask authors"}]
    assert {reference["url"] for reference in citation["references"]} >= {
        "https://arxiv.org/abs/2012.12877",
        "https://arxiv.org/abs/2010.11929",
    }
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git clone")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_pictures_and_no_weights_are_tracked(tracked: list[Path]) -> None:
    assert len(tracked) > 50
    pictures = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"}
    weights = {".ckpt", ".pth", ".pt", ".safetensors", ".bin", ".onnx", ".npy", ".npz", ".pkl"}
    screenshot = ROOT / "experiments" / "demo.png"  # of a drawn face
    assert [path for path in tracked if path.suffix.lower() in pictures | weights and path != screenshot] == []


def test_tracked_files_are_small(tracked: list[Path]) -> None:
    assert [path for path in tracked if path.stat().st_size > 1_000_000] == []


def test_no_tracked_text_holds_a_path_of_one_machine(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}: {match}" for match in re.findall(r"/(?:home|Users|work)/\w[\w./-]*", text)
        ]
    assert found == []
