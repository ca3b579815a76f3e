"""Run folders in the real format, and a real Chromium, spoken to over its DevTools pipe."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from batchproof.records import write_columns

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 30.0  # seconds; a machine under load is slow, not broken


class Browser:
    """One process; its tabs are `Page`."""

    def __init__(self, binary: str, folder: Path) -> None:
        # The protocol's pipe is file descriptors 3 (commands) and 4 (answers), NUL after each.
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{commands} 4>&{answers}',
                "browser",
                binary,
                "--headless=new",
                "--remote-debugging-pipe",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer = b""
        self._number = 0
        self.events: list[dict] = []

    def call(self, method: str, session: str | None = None, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, deadline: float) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], deadline - time.monotonic())
            chunk = os.read(self._answers, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("the browser does not answer")
            self._buffer += chunk
        text, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(text)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        return Page(self, path, width, height, dark)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self._commands)
        os.close(self._answers)


class Page:
    """A tab that shows a file, once all its figures are drawn."""

    def __init__(self, browser: Browser, path: Path, width: int, height: int, dark: bool) -> None:
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.drawn")

    def call(self, method: str, **params) -> dict:
        return self.browser.call(method, self.session, **params)

    def js(self, expression: str):
        """The value of an expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str):
        """Ask until it is true."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.js(expression)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"never true: {expression}")
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """A real click of the mouse on the middle of an element."""
        x, y = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40, "ArrowRight": 39}[key]
        text = {"Enter": "\r", " ": " "}.get(key, "")
        name = "Space" if key == " " else key
        common = {"key": key, "code": name, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def seen(self, *methods: str) -> list[dict]:
        """Events of these kinds so far."""
        self.js("1")  # whatever was on its way has arrived before this answer
        return [
            event["params"]
            for event in self.browser.events
            if event.get("sessionId") == self.session and event.get("method") in methods
        ]

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip("no Chromium found: install one (Debian: apt install chromium)")
    made = Browser(binary, tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


def _training(algo="td3", *, norm=None, plan="TETTE", env="Pendulum-v1", seeds=(0, 1), **more):
    net = {"hidden": [64, 64], "norm": norm or {"kind": "none", "placement": "pre"}}
    config = {"actor": dict(net), "critic": dict(net), "plan": plan, "gamma": 0.99}
    config |= more.pop("config", {})
    return {
        "algo": algo,
        "config": config,
        "env_id": env,
        "env_options": {},
        "seeds": list(seeds),
        "steps": 30,
        **more,
    }


def _write_run(folder, record, *, steps=(10, 20, 30), returns=None, status="finished", **metrics):
    """A run folder as `batchproof.lab.loop` leaves it; rows go by step, then by seed."""
    folder.mkdir(parents=True)
    seeds = record["seeds"]
    if returns is None:
        returns = [[100.0 * seed + step for step in steps] for seed in seeds]
    values = np.asarray(returns, dtype=float)
    columns = {
        "seed": np.tile(seeds, len(steps)),
        "step": np.repeat(steps, len(seeds)),
        "return": values.T.ravel(),
        "diverged": np.isnan(values).T.ravel(),
        **{name: np.asarray(rows, dtype=float).T.ravel() for name, rows in metrics.items()},
    }
    write_columns(folder / "metrics.parquet", columns)
    run = {"status": status, "training": record, "wall_s": 60.0, "command": "batchproof train"}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(scope="session")
def training():
    """Makes the ``training`` part of a ``run.json``."""
    return _training


@pytest.fixture(scope="session")
def write_run():
    """Makes a run folder."""
    return _write_run
