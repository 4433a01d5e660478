"""A headless Chromium that a test drives over its debugging pipe, without any network."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("chromium")
needed = pytest.mark.skipif(PROGRAM is None, reason="no chromium on this machine (Debian: apt install chromium)")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--remote-debugging-pipe")


class Browser:
    """One page. requested: every address that it loaded."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers, self.number, self.rest, self.session = commands, answers, 0, b"", None
        self.requested: list[str] = []

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Page.enable")
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until the expression is true."""
        end = time.monotonic() + 20
        while not self.value(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")

    def type(self, selector: str, text: str) -> None:
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{{ const e = {element}; e.value = {json.dumps(text)}; e.dispatchEvent(new Event('input')); }}")

    def texts(self, selector: str) -> list[str]:
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.answers], [], [], 30)[0], "Chromium is silent"
                self.rest += os.read(self.answers, 1 << 16)
            first, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(first)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """profile: an empty folder for the browser's own files."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    arguments = ["bash", "-c", command, PROGRAM, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(arguments, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        os.close(theirs_in), os.close(theirs_out)
        page = Browser(ours_out, ours_in)
        yield page
        page.session = None
        page.call("Browser.close")
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out), os.close(ours_in)
