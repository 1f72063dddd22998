"""`facemask demo`: one page, served on this machine by the standard library, that shows what a model says of a picture.

The page loads nothing from anywhere else, and its Content-Security-Policy forbids it to.
"""

import errno
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np
import torch

from facemask.data.images import BadImage
from facemask.errors import UserError
from facemask.explain import describe, overlay
from facemask.modeling.attention import TOKENS, attention_maps
from facemask.predict import Model
from facemask.runs.page import picture, render
from facemask.runs.report import title

MAX_MEGABYTES = 20
PATIENCE = 30  # seconds for a browser's next bytes
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SIDE = 224  # of the pictures on the page
Answer = Callable[[bytes], dict[str, Any]]


def ask(model: Model, data: bytes | np.ndarray) -> dict[str, Any]:
    """What the page shows of a picture (bytes of a file, or uint8 pixels): decision, heads, maps, milliseconds.

    Raises:
        UserError: they give no picture, or one of too many pixels.
    """
    times = [time.perf_counter()]
    try:
        view = model.view(data)
    except BadImage as problem:
        raise UserError(f"{problem.reason}: choose another picture") from problem
    times.append(time.perf_counter())
    by_head = {head: p[0] for head, p in model.probabilities(model.logits(view[None])).items()}
    times.append(time.perf_counter())
    pixels = torch.from_numpy(view).permute(2, 0, 1)[None].to(model.device)
    maps = attention_maps(model.classifier.backbone, pixels, [head for head in model.heads if head in TOKENS])
    shown = cv2.resize(view, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    pictures = [("what the model sees", picture(shown, SIDE))]
    for kind, heat in maps.items():
        pictures.append((describe(kind, model), picture(overlay(shown, heat[0].cpu().double().numpy()), SIDE)))
    times.append(time.perf_counter())
    decided = by_head[model.head]
    return {
        "label": model.classes[decided.argmax()],
        "probability": float(decided.max()),
        "probabilities": dict(zip(model.classes, decided.tolist(), strict=True)),
        "calibrated": model.calibrated,
        "unsure": bool(decided.max() < model.threshold),
        "heads": [
            {"title": title(head, model.heads), "label": model.classes[p.argmax()], "probability": float(p.max())}
            for head, p in by_head.items()
        ],
        "pictures": pictures,
        "milliseconds": dict(zip(("decoding", "model", "attention"), (1000 * np.diff(times)).tolist(), strict=True)),
    }


def build_server(load: Callable[[], Model], host: str, port: int) -> "Server":
    """The server of a model's page, not yet serving; the model is loaded once host and port are held.

    Raises:
        UserError: host or port cannot be had, or what `load` raises.
    """
    server = Server(host, port)
    try:
        model = load()
        ask(model, np.zeros((SIDE, SIDE, 3), np.uint8))  # the first answer is slower than the others
    except BaseException:
        server.server_close()
        raise
    about = f"{model.source}: {model.classifier.hparams['model']['name']}, {model.img_size} px; {model.calibration}"
    server.show(about, model.max_pixels, lambda data: ask(model, data))
    return server


def serve(load: Callable[[], Model], host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C. Raises what `build_server` does."""
    with build_server(load, host, port) as server:
        try:
            say(f"serving at {server.url} (Ctrl-C stops)")
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")


class Server(ThreadingHTTPServer):
    """A thread per request, one answer at a time: of the pictures that wait only the files are in memory."""

    request_queue_size = 64

    page: bytes
    answer: Answer

    def __init__(self, host: str, port: int) -> None:
        self.turn = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                mend = "stop it, or choose another --port (0 takes a free one)"
                raise UserError(f"port {port} is taken by another program: {mend}") from error
            raise UserError(f"{host}:{port} cannot be served ({error.strerror}): choose --host, --port") from error

    def show(self, about: str, max_pixels: int, answer: Answer) -> None:
        """What is on the page, and who answers pictures."""
        limits = {"megabytes": MAX_MEGABYTES, "megapixels": max_pixels // 1_000_000}
        self.page, self.answer = render("demo.html.j2", about=about, **limits).encode(), answer

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}/" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no event; anything else is told where the command was started."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /predict takes the bytes of a picture and answers in JSON, {"error": sentence} where it
    must."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/":
            self._reply(200, "text/html; charset=utf-8", self.server.page)
        else:
            self._refuse(404, "there is only one page, /")

    def do_POST(self) -> None:
        if self.path != "/predict":
            return self._refuse(404, "pictures go to /predict")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self._refuse(411, "the request does not say how many bytes it sends")
        if int(length) > MAX_MEGABYTES * 1_000_000:
            return self._refuse(413, f"this page takes at most {MAX_MEGABYTES} MB: choose a smaller picture")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            return self._refuse(400, "the picture was cut off on its way")
        try:
            with self.server.turn:
                answer = self.server.answer(data)
        except UserError as error:
            return self._refuse(422, str(error))
        except Exception:
            self._refuse(500, "the model failed on this picture: see where facemask demo was started")
            raise
        self._reply(200, "application/json", json.dumps(answer).encode())

    def _refuse(self, status: int, sentence: str) -> None:
        self.close_connection = True  # what was not read must not be taken for the next request
        self._reply(status, "application/json", json.dumps({"error": sentence}).encode())

    def _reply(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(content), "Cache-Control": "no-store"}
        headers |= {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        headers |= {"Connection": "close"} if self.close_connection else {}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: names and times of uploads are nobody's business."""
