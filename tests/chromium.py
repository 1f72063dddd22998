"""A headless Chromium that reaches nothing but 127.0.0.1; `python tests/chromium.py RUN OUT.png` shows the demo in it.

The distribution's chromium and chromium-driver, and the Python package selenium.
"""

import io
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

DRIVER = shutil.which("chromedriver")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=940,900",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


class Browser:
    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def element(self, name: str):
        return self.driver.find_element(By.ID, name)

    def wait(self, name: str) -> str:
        """The text of an element, once it is shown."""
        WebDriverWait(self.driver, 30).until(lambda _: self.element(name).is_displayed())
        return self.element(name).text

    def upload(self, file: Path, shown: str) -> str:
        self.element("file").send_keys(str(file))
        return self.wait(shown)

    def requested(self) -> list[str]:
        """Addresses that pages asked for since the last call, pictures inside the page left out."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]


@contextmanager
def chromium() -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@contextmanager
def running(server) -> Iterator[str]:
    """The address of a server that serves in a thread."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main(run: str, out: str) -> None:
    from facemask.data.synthetic import write_folder
    from facemask.demo import build_server
    from facemask.predict import load_model

    server = build_server(lambda: load_model(run), "127.0.0.1", 0)
    with TemporaryDirectory() as made, running(server) as url, chromium() as page:
        write_folder(Path(made), 20, 1)
        page.driver.get(url)
        page.driver.execute_script("document.getElementById('about').textContent = arguments[0]", Path(run).name)
        page.upload(sorted(Path(made, "with_mask").glob("*.*g"))[3], "result")
        page.driver.set_window_size(940, 1220)
        shot = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
        shot.quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
