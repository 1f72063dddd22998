"""How long the search for near-duplicates takes, and how right it is: `facemask bench scan`, `... duplicates`."""

import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from facemask.bench import show, write_result
from facemask.data.manifest import load_manifest, scan
from facemask.embedding import build_embedder

SIDE = 96
# Of every ten made pictures three are copies of a fourth: resized, mirrored, re-encoded.
BLOCK, COPIES = 10, 3


def bench_scan(sizes: Sequence[int], out: Path) -> Path:
    """Seconds of the first and of a second scan of so many made pictures, and which copies are found.

    Writes and returns out/bench/<machine kind>/scan.json.
    """
    rows = []
    for count in (BLOCK, *sizes):
        with tempfile.TemporaryDirectory() as folder:
            known = make_pictures(Path(folder), count)
            rows.append(_search(Path(folder), known, thorough=False))
    content = _shown(f"made pictures of {SIDE} x {SIDE} pixels", rows[1:])  # the first loaded the libraries
    return write_result(content, "scan", out, sizes=",".join(map(str, sizes)))


def bench_duplicates(root: Path, reference: Path, thorough: bool, out: Path) -> Path:
    """Precision and recall of the groups of near-duplicates against the dup_group column of a manifest, pair by pair.

    Writes and returns out/bench/<machine kind>/duplicates.json. Raises UserError as `load_manifest` does.
    """
    with tempfile.TemporaryDirectory() as cache:
        known = load_manifest(root, reference, cache_dir=Path(cache)).set_index("path")["group"]
    searches = [_search(root, known, thorough=deep) for deep in ([False, True] if thorough else [False])]
    command = f"facemask bench duplicates DIR --reference {reference.name}{' --thorough' * thorough}"
    content = {"command": command, **_shown(f"a folder, against {reference.name}", searches)}
    return write_result(content, "duplicates", out)


def make_pictures(root: Path, count: int) -> pd.Series:
    """Write `count` JPEGs of random textures and copies of them; returns path -> number of its original.

    An octave of the spectrum holds as much energy as any other, as it does in photographs (Field 1987).
    """
    known = {}
    for label in "ab":
        (root / label).mkdir()
    for number in range(count):
        copy = number % BLOCK - (BLOCK - 1 - COPIES)  # 1, 2, 3; not positive: an original
        original = number - max(copy, 0)
        rng = np.random.default_rng(original)
        octaves = [rng.normal(0, 25, (side, side, 3)).astype(np.float32) for side in (3, 6, 12, 24, 48)]
        layers = [cv2.resize(octave, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for octave in octaves]
        pixels = np.clip(128 + np.sum(layers, axis=0), 0, 255).astype(np.uint8)
        if copy == 1:
            pixels = cv2.resize(pixels, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
        if copy == 2:
            pixels = cv2.flip(pixels, 1)
        _, content = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 40 if copy == 3 else 90])
        path = f"{'ab'[number % 2]}/{number:06}.jpg"
        (root / path).write_bytes(content.tobytes())
        known[path] = original
    return pd.Series(known)


def pairwise(found: pd.Series, known: pd.Series) -> dict[str, Any]:
    """Precision and recall of the pairs within found groups, given the known ones; None where there are no pairs."""
    table = pd.DataFrame({"found": found, "known": known.reindex(found.index)})
    columns = {"found": ["found"], "known": ["known"], "both": ["found", "known"]}
    sizes = {name: table.value_counts(names) for name, names in columns.items()}
    pairs = {name: int((size * (size - 1) // 2).sum()) for name, size in sizes.items()}
    groups = {name: int((sizes[name] > 1).sum()) for name in ("found", "known")}
    precision, recall = (pairs["both"] / pairs[of] if pairs[of] else None for of in ("found", "known"))
    return {"groups": groups, "pairs": pairs, "precision": precision, "recall": recall}


def _search(root: Path, known: pd.Series, *, thorough: bool) -> dict[str, Any]:
    """Two scans of a folder, of which nothing is known before the first, and how right they are."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            start = time.perf_counter()
            embed = build_embedder() if thorough else None
            table = scan(root, Path(folder, "m.csv"), cache_dir=Path(folder), embed=embed)
            seconds.append(time.perf_counter() - start)
    figures = pairwise(table.set_index("path")["dup_group"], known)
    search = {"search": "thorough" if thorough else "quick", "files": len(table)}
    # Of this process so far: the larger and the thorough searches come last.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**search, "seconds": seconds[0], "rescan_seconds": seconds[1], "peak_rss_mib": peak, **figures}


def _shown(source: str, searches: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the searches; returns them as the file has them."""
    columns = ["files", "first\ns", "files/s", "again\ns", "peak\nMiB", "groups\nfound/known", "precision", "recall"]
    rows = []
    for row in searches:
        files = f"{row['files']:,}{' thorough' * (row['search'] == 'thorough')}"
        times = f"{row['seconds']:.1f}", f"{row['files'] / row['seconds']:.0f}", f"{row['rescan_seconds']:.2f}"
        groups = f"{row['groups']['found']:,}/{row['groups']['known']:,}"
        shares = ("-" if row[of] is None else f"{row[of]:.4f}" for of in ("precision", "recall"))
        rows.append([files, *times, f"{row['peak_rss_mib']:,.0f}", groups, *shares])
    show(f"Near-duplicates: {source}", columns, rows)
    return {"source": source, "searches": searches}
