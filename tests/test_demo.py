"""The page of `facemask demo`: its server alone, and in a real browser that can reach nothing but this machine."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from drawn_run import drawn_run
from PIL import Image
from typer.testing import CliRunner

from facemask.cli import app
from facemask.data.synthetic import write_folder
from facemask.demo import MAX_MEGABYTES, Answer, Server, build_server
from facemask.errors import UserError
from facemask.predict import load_model

pytest.importorskip("selenium", reason="needs selenium")
from chromium import DRIVER, chromium, running


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server("127.0.0.1", 0)
    server.show("<b>a run</b>", 64_000_000, answer)
    with running(server):
        yield server


@pytest.fixture
def server():
    with serving(lambda data: {"bytes": len(data)}) as server:
        yield server


def send(server: Server, method: str, path: str, body: bytes | None = None, headers=None) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection.request(method, path, body, headers or {})
    reply = connection.getresponse()
    return reply.status, dict(reply.headers), reply.read()


def error_of(reply: tuple[int, dict, bytes]) -> tuple[int, str]:
    return reply[0], json.loads(reply[2])["error"]


def test_serves_one_page_that_may_load_nothing(server):
    status, headers, page = send(server, "GET", "/?x")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"&lt;b&gt;a run&lt;/b&gt;" in page
    assert b"http://" not in page
    assert b"https://" not in page
    assert error_of(send(server, "GET", "/etc/passwd")) == (404, "there is only one page, /")
    assert send(server, "POST", "/predict", b"abc")[2] == b'{"bytes": 3}'


def test_refuses_what_is_too_much_before_it_is_read(server):
    size = MAX_MEGABYTES * 1_000_000
    assert json.loads(send(server, "POST", "/predict", bytes(size))[2]) == {"bytes": size}
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", str(size + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    assert error_of(send(server, "POST", "/predict", headers={"Content-Length": "-1"}))[0] == 411
    assert error_of(send(server, "POST", "/elsewhere", b"x"))[0] == 404
    with socket.create_connection(server.server_address) as line:
        line.sendall(b"POST /predict HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc")
        line.shutdown(socket.SHUT_WR)
        assert b"the picture was cut off" in line.makefile("rb").read()


def test_answers_one_at_a_time_and_all_ten():
    inside, most = [], []

    def answer(data: bytes) -> dict:
        inside.append(data)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return {"bytes": len(data)}

    with serving(answer) as server, ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(lambda n: send(server, "POST", "/predict", bytes(n)), range(10)))
    assert [json.loads(content)["bytes"] for _, _, content in replies] == list(range(10))
    assert most == [1] * 10


def test_a_defect_is_told_on_both_sides(capsys):
    def answer(data: bytes) -> dict:
        raise ZeroDivisionError

    with serving(answer) as server:
        assert error_of(send(server, "POST", "/predict", b"x")) == (
            500,
            "the model failed on this picture: see where facemask demo was started",
        )
        told = ""
        while "ZeroDivisionError" not in told:  # by another thread, after the reply
            told += capsys.readouterr().err


def test_a_taken_port_and_a_foreign_host_end_in_a_sentence_before_the_model_is_loaded():
    def load():
        raise AssertionError("loaded for nothing")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken by another program: stop it, or choose another"):
            build_server(load, "127.0.0.1", port)
    with pytest.raises(UserError, match=r"192\.0\.2\.1:0 cannot be served .*: choose --host, --port"):
        build_server(load, "192.0.2.1", 0)
    with Server("::1", 0) as server:
        assert server.url.startswith("http://[::1]:")


# -- with a model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return drawn_run(tmp_path_factory.mktemp("demo"), "model=deit_distilled")


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("faces")
    write_folder(folder, 10, 1)
    return sorted(folder.glob("with*/*.*"))


def test_says_what_predict_says(run, faces):
    model = load_model(run, precision="fp32")
    with running(build_server(lambda: model, "127.0.0.1", 0)) as url:
        answers = [json.loads(urllib.request.urlopen(f"{url}predict", file.read_bytes()).read()) for file in faces]
    for answer, expected in zip(answers, model.predict(faces), strict=True):
        assert answer["label"] == expected.label
        assert answer["probability"] == pytest.approx(expected.probability, abs=1e-5)
        assert answer["unsure"] == expected.unsure
        assert {head["title"]: head["label"] for head in answer["heads"]} == {
            "student class head": expected.heads["head"][0],
            "student distillation head": expected.heads["head_dist"][0],
            "student mean of heads": expected.heads["mean"][0],
        }
        assert [name for name, _ in answer["pictures"]] == [
            "what the model sees",
            "attention rollout, class token",
            "attention rollout, distillation token",
            "gradient-weighted attention, class token",
            "gradient-weighted attention, distillation token",
        ]
        assert list(answer["milliseconds"]) == ["decoding", "model", "attention"]


def test_needs_a_run():
    result = CliRunner().invoke(app, ["demo", "nowhere"])
    assert "nowhere does not exist" in str(result.exception)


@pytest.mark.slow
def test_stops_on_ctrl_c(run):
    process = subprocess.Popen(
        [sys.executable, "-c", "from facemask.cli import main; main()", "demo", str(run), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving at http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "stopped\n", "")


@pytest.mark.slow
@pytest.mark.skipif(DRIVER is None, reason="needs chromium and chromium-driver")
def test_in_a_browser_without_the_internet(run, faces, tmp_path):
    bad, large, many = tmp_path / "letter.jpg", tmp_path / "large.png", tmp_path / "many.png"
    bad.write_text("Dear all")
    large.write_bytes(bytes(MAX_MEGABYTES * 1_000_000 + 1))
    Image.new("1", (9000, 8000)).save(many)
    with running(build_server(lambda: load_model(run), "127.0.0.1", 0)) as url, chromium() as page:
        page.driver.get(url)
        text = page.upload(faces[0], "result")
        assert page.wait("label") in ("with_mask", "without_mask")
        for part in ("calibrated", "student distillation head", "gradient-weighted attention", "ms from here and back"):
            assert part in text
        images = "return [...document.images].map(image => image.naturalWidth)"
        assert page.driver.execute_script(images) == [224] * 5

        assert page.upload(bad, "message") == (
            "letter.jpg: not a JPEG, PNG, WEBP or GIF picture: choose another picture"
        )
        assert not page.element("result").is_displayed()
        assert page.upload(large, "message").startswith("large.png has 20.0 MB; this page takes at most 20 MB")
        assert "more than data.max_pixels=64000000 allows" in page.upload(many, "message")

        page.element("camera").click()  # Chromium's own moving test picture
        page.wait("shoot")
        page.element("shoot").click()
        page.wait("result")

        script = """
            const [size, done] = arguments, pictures = [];
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [size, size];
            canvas.toBlob(blob => Promise.all(Array.from({length: 10}, () =>
                fetch("predict", {method: "POST", body: blob}).then(reply => reply.json()))).then(done));
        """
        answers = page.driver.execute_async_script(script, 300)
        assert len(answers) == 10
        assert len({answer["probability"] for answer in answers}) == 1
        assert {"label", "heads"} <= answers[0].keys()

        assert set(page.requested()) == {url, f"{url}predict"}
        complaints = [entry["message"] for entry in page.driver.get_log("browser")]
        assert all("status of 422" in message for message in complaints), complaints
