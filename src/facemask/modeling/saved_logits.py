"""What a teacher says of a training view, computed once and kept for every run that sees the same view.

A view is a function of (augment seed, epoch, row of the training split). Everything else that its logits depend on is
the header, and the sha256 of the header names the folder: cache_dir/teacher_logits/<key>/header.json, and one file of
pictures x (classes + 1) x 4 bytes an epoch, of zeros until a run asks the teacher.
"""

import hashlib
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from facemask.errors import UserError
from facemask.files import write_bytes, write_text
from facemask.modeling.teacher import Teacher

log = logging.getLogger(__name__)

# Kernels are chosen by the size of a batch, and round differently. In groups of one size a picture's logits are the
# same bits in a batch of any size, on any rank, and beside any other pictures.
GROUP = 16
# What else is a function of a view and is kept like the logits, and how to do without.
KINDS = {
    "teacher_logits": ("the teacher's logits", "ask the teacher at every step with teacher.save_logits=false"),
    "features": ("the frozen backbone's features", "compute them at every step with model.save_features=false"),
}


def ask_in_groups(teacher: Teacher, pixels: Tensor, folds: Tensor) -> Tensor:
    """The teacher's logits (B, C) of pixels uint8 (B, 3, H, W), each by the teacher of its fold (B,)."""
    said = []
    for start in range(0, len(pixels), GROUP):
        rows = torch.arange(start, start + GROUP).clamp(max=len(pixels) - 1)  # the last group is filled up
        said.append(teacher(pixels[rows.to(pixels.device)], folds[rows]).logits)
    return torch.cat(said)[: len(pixels)]


class SavedLogits:
    """Logits (fp32) of the views of a training split under one header.

    Each row has a checksum of its logits, key, epoch and row; 0 stands for a row that was never asked for. It is
    written after the logits, so that a killed run leaves whole rows; and every process would write the same bytes, so
    that any number of runs and ranks may write at once.

    Args:
        cache_dir: parent of teacher_logits.
        header: all that the logits depend on but epoch and row, as JSON has it.
        pictures: N, of the training split.
        classes: C.
        kind: of `KINDS`; the sub-folder of cache_dir.

    Raises:
        UserError: cache_dir cannot be written, or the folder of this header holds another header.
    """

    def __init__(
        self, cache_dir: Path, header: dict[str, Any], pictures: int, classes: int, kind: str = "teacher_logits"
    ) -> None:
        text = json.dumps({**header, "pictures": pictures, "classes": classes}, indent=1, sort_keys=True) + "\n"
        self.kind = kind
        self.key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder = cache_dir / kind / self.key
        self.pictures = pictures
        self.dtype = np.dtype([("logits", "<f4", (classes,)), ("checksum", "<u4")])
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, self.dtype))  # the one used last
        file = self.folder / "header.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_text(file, text)
            same = file.read_bytes() == text.encode()
        except OSError as error:
            raise self._unwritable(error) from error
        if not same:
            raise UserError(
                f"{file} is not the header that the saved teacher logits were computed under, so they may be of other "
                f"views or of another teacher: delete the folder {self.folder}, and they are computed again"
            )

    def covers(self, epochs: range, batch_size: int) -> bool:
        """Whether all of these epochs is saved but for what makes no whole batch, which no run asks for."""
        return all(
            self._file(epoch).exists() and (self._rows(epoch)["checksum"] == 0).sum() < batch_size for epoch in epochs
        )

    def read(self, epoch: int, rows: np.ndarray) -> Tensor | None:
        """The logits (B, C) of rows (B,), or None where any of them is not saved, or not as it was written."""
        saved = self._rows(epoch)[rows]
        if (saved["checksum"] == 0).any():
            return None
        if damaged := int((saved["checksum"] != self._checksums(epoch, rows, saved["logits"])).sum()):
            log.warning("%d logits in %s are damaged and are computed again", damaged, self._file(epoch))
            return None
        return torch.from_numpy(saved["logits"].astype(np.float32))

    def write(self, epoch: int, rows: np.ndarray, logits: Tensor) -> None:
        """Keep the logits (B, C) of rows (B,)."""
        values, records = logits.detach().cpu().numpy().astype("<f4"), self._rows(epoch)
        records["logits"][rows] = values
        records["checksum"][rows] = self._checksums(epoch, rows, values)

    def _checksums(self, epoch: int, rows: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """CRC-32 (B,), never 0."""
        start = zlib.crc32(f"{self.key}/{epoch}".encode())
        lines = np.concatenate([rows.astype("<u4")[:, None], np.ascontiguousarray(logits).view("<u4")], axis=1)
        return np.array([zlib.crc32(line, start) or 1 for line in lines], dtype="<u4")

    def _file(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:04d}.bin"

    def _rows(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            file, size = self._file(epoch), self.pictures * self.dtype.itemsize
            try:
                # The file takes its whole room at once: a full disk is told here, and not by a signal when it is used.
                with FileLock(self.folder / ".lock"):
                    if not file.exists() or file.stat().st_size != size:
                        write_bytes(file, bytes(size))
                self._epoch = epoch, np.memmap(file, self.dtype, "r+")
            except OSError as error:
                raise self._unwritable(error) from error
        return self._epoch[1]

    def _unwritable(self, error: OSError) -> UserError:
        what, option = KINDS[self.kind]
        return UserError(
            f"{what} cannot be kept in {self.folder} ({error.strerror or error}): choose another cache_dir=DIR, or "
            f"{option}"
        )
