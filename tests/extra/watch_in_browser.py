"""The page of tools/watch_run.py for real runs, seen by Chromium at 1280 and 400 pixels of width, light and dark.

    python -m tests.extra.watch_in_browser --output /tmp/pages

Trains two small models, one of which is stopped and started again, watches them, and opens the page while they train:
it has to show later steps by itself. Writes a picture of each view of the last page, to be looked at. Needs `chromium`,
from Debian's packages, so it is no test of the suite.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.train.launchers import ROOT, environment
from tests.train.runs import TINY, Corpus, words, write_corpus

STEPS, STOP = 60, 30
WIDTHS, HEIGHT = (1280, 400), 900
SETTINGS: dict[str, Any] = {**TINY, "train_iters": STEPS, "random_ltd_steps": 45, "eval_interval": 15,
                            "save_interval": 15}
DENSE = {name: None for name in TINY if name.startswith("random_ltd")}
LEAST_CONTRAST = 4.5
"""Of text, by the Web Content Accessibility Guidelines 2.2, criterion 1.4.3."""
LOOK = """(() => {
  const color = element => getComputedStyle(element).color, body = document.body;
  return JSON.stringify({
    width: document.documentElement.scrollWidth, text: body.innerText, paper: getComputedStyle(body).backgroundColor,
    inks: [color(body), color(document.querySelector("dt"))],
    charts: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
    letters: Math.min(...[...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)),
  });
})()"""


class Browser:
    """Chromium without a window, commanded through a pair of pipes (the Chrome DevTools Protocol)."""

    def __init__(self, profile: Path):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", "chromium", *flags],
            pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._answers, self._number, self._session = os.fdopen(self._in, "rb"), 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._number:
                assert "result" in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    def _message(self) -> bytes:
        parts = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            parts += byte
        return bytes(parts)

    def look(self) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while "value" not in (answer := self.call("Runtime.evaluate", expression=LOOK))["result"]:  # it is being read
            assert time.monotonic() < deadline, answer
            time.sleep(0.1)
        found: dict[str, Any] = json.loads(answer["result"]["value"])
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def train(folder: Path, corpus: Corpus, **settings: Any) -> "subprocess.Popen[bytes]":
    folder.mkdir(exist_ok=True)
    given = {**SETTINGS, **corpus.settings, "save": str(folder), "load": str(folder),
             "metrics_file": str(folder / "metrics.jsonl"), **settings}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "megatron_ltd.pretrain_gpt", *words(given)], env=environment(),
                                stdout=log, stderr=log)


@contextmanager
def watched(folders: list[Path], output: Path) -> Iterator[None]:
    """Meanwhile the page is kept up to date; it must end by itself, with the runs."""
    metrics = [f"{path.name}={path}" for path in folders]
    watch = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "watch_run.py"), "--metrics", *metrics, "--checkpoints",
         *map(str, folders), "--train-iters", str(STEPS), "--output", str(output), "--interval", "1"])
    try:
        yield
        assert watch.wait(60) == 0
    finally:
        watch.kill()


def contrast(first: str, second: str) -> float:
    """Of two colours as the browser names them, `rgb(...)`."""
    def luminance(color: str) -> float:
        parts = [float(part) / 255 for part in color[color.index("(") + 1:-1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def see_it_refresh(browser: Browser, page: Path) -> None:
    """The page that is opened once shows a later state by itself."""
    browser.call("Page.navigate", url=page.as_uri())
    time.sleep(2)
    first, deadline = browser.look()["text"], time.monotonic() + 30
    assert "running" in first, first
    while browser.look()["text"] == first:
        assert time.monotonic() < deadline, "the page does not read itself again"
        time.sleep(0.5)


def see(browser: Browser, page: Path, width: int, scheme: str, picture: Path) -> str:
    """Check a view, write its picture, and return a line on it."""
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Page.navigate", url=page.as_uri())
    time.sleep(1)
    found = browser.look()
    picture.write_bytes(base64.b64decode(
        browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))
    least = min(contrast(ink, found["paper"]) for ink in found["inks"])
    dark = contrast(found["paper"], "rgb(0, 0, 0)") < contrast(found["paper"], "rgb(255, 255, 255)")
    assert found["width"] <= width and max(found["charts"]) <= width, found
    assert dark == (scheme == "dark") and least >= LEAST_CONTRAST, found
    for fact in (f"{STEPS} of {STEPS}", "restarts", f"from step {STOP}: code 11", "ended with code 0"):
        assert fact in found["text"], (fact, found["text"])
    return (f"{width} px, {scheme}: {len(found['charts'])} charts of {max(found['charts']):.0f} px, letters of "
            f"{found['letters']:.0f} px, contrast {least:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the page and its pictures")
    output = parser.parse_args().output.resolve()
    if shutil.which("chromium") is None:
        sys.exit("chromium is not installed")
    output.mkdir(parents=True)
    corpus, page = write_corpus(output), output / "watch.html"
    folders = [output / "dense", output / "ltd"]
    assert train(folders[1], corpus, exit_interval=STOP).wait() == 11
    browser, runs = Browser(output / "profile"), []
    try:
        runs += [train(folders[0], corpus, **DENSE), train(folders[1], corpus)]
        while not (folders[0] / "metrics.jsonl").exists() or (folders[1] / "exit.json").exists():
            time.sleep(0.1)
        with watched(folders, page):
            while not page.exists():
                time.sleep(0.1)
            see_it_refresh(browser, page)
            assert [run.wait() for run in runs] == [0, 0]
        for width in WIDTHS:
            for scheme in ("light", "dark"):
                print(see(browser, page, width, scheme, output / f"{width}-{scheme}.png"), flush=True)
    finally:
        browser.close()
        for run in runs:
            run.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
