"""Headless Chromium, driven through ChromeDriver's WebDriver protocol. No package beyond httpx is needed."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what WebDriver calls the key of an element
_PATIENCE_S = 30.0
# As root Chromium has no sandbox; it asks nobody anything but the page's server.
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--disable-extensions",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)

_HAND_OVER = """
const [kind, selector, name, type, data] = arguments;
const transfer = new DataTransfer();
if (name) transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, {type}));
else transfer.setData('text/uri-list', data);
const options = {bubbles: true, cancelable: true};
const event = kind === 'drop' ? new DragEvent('drop', {...options, dataTransfer: transfer})
                              : new ClipboardEvent('paste', {...options, clipboardData: transfer});
document.querySelector(selector).dispatchEvent(event);
"""
_DOWNLOADS = """
const links = [...document.querySelectorAll(`${arguments[0]} a[download]`)];
return Promise.all(links.map(async (link) => {
  const bytes = new Uint8Array(await (await fetch(link.href)).arrayBuffer());
  return btoa(String.fromCharCode(...bytes));
}));
"""
_LOWEST_CONTRAST = """
const light = (colour) => {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
  const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/rgba\\(.*, 0\\)/.test(colour)) return colour;
  }
};
document.querySelectorAll('*').forEach((element) => (element.style.transition = 'none'));
return [...document.querySelectorAll('h1, p, label, legend, summary, button, input, select, span, output')]
  .filter((element) => element.checkVisibility() && !element.disabled && element.type !== 'file')
  .map((element) => {
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${element.tagName} ${element.id} ${element.className}`];
  })
  .sort((x, y) => x[0] - y[0])[0];
"""


def missing_browser() -> str | None:
    """Why there is no browser to drive; None where there is one."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not installed: apt-get install chromium chromium-driver" if lacking else None


class Browser:
    """One window.

    Args:
        client: of a ChromeDriver session.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def open(self, url: str) -> None:
        self._send("POST", "url", url=url)

    def run(self, script: str, *arguments: object) -> object:
        """Run a function's body in the page; a promise is waited for."""
        return self._send("POST", "execute/sync", script=script, args=list(arguments))

    def click(self, selector: str) -> None:
        self._send("POST", f"element/{self._find(selector)}/click")

    def type(self, selector: str, text: str, *, clear: bool = False) -> None:
        """Type into an element; into a file input the path of a file."""
        element = self._find(selector)
        if clear:
            self._send("POST", f"element/{element}/clear")
        self._send("POST", f"element/{element}/value", text=text)

    def press(self, *keys: str) -> None:
        """Press keys together, wherever the focus is."""
        actions = [{"type": "keyDown", "value": key} for key in keys] + [{"type": "keyUp", "value": key} for key in keys[::-1]]
        self._send("POST", "actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def until(self, condition: str, *arguments: object) -> object:
        """Look until an expression is true, and return its value."""
        end = time.monotonic() + _PATIENCE_S
        while not (found := self.run(f"return {condition}", *arguments)):
            assert time.monotonic() < end, f"not within {_PATIENCE_S} s: {condition}"
        return found

    def resize(self, width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> None:
        """The page's size in CSS pixels, and its colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def hand_over(self, kind: str, selector: str, name: str | None, media_type: str | None, data: str) -> None:
        """Drop or paste onto an element: a file, its bytes in base64, or without a name a link."""
        self.run(_HAND_OVER, kind, selector, name, media_type, data)

    def downloads(self, selector: str) -> list[bytes]:
        """The files behind an element's download links."""
        found = self.run(_DOWNLOADS, selector)
        assert isinstance(found, list)
        return [base64.b64decode(text) for text in found]

    def lowest_contrast(self) -> tuple[float, str]:
        """The least contrast of a visible text with what is behind it, as WCAG measures it, and the element."""
        found = self.run(_LOWEST_CONTRAST)
        assert isinstance(found, list)
        return float(found[0]), str(found[1])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(str(self._send("GET", "screenshot"))))

    def log(self) -> list[str]:
        """What the console has said since it was last asked: errors of scripts, refused resources."""
        entries = self._send("POST", "se/log", type="browser")
        assert isinstance(entries, list)
        return [str(entry["message"]) for entry in entries]

    def devtools(self, command: str, **parameters: object) -> None:
        self._send("POST", "goog/cdp/execute", cmd=command, params=parameters)

    def _find(self, selector: str) -> str:
        found = self._send("POST", "element", using="css selector", value=selector)
        assert isinstance(found, dict)
        return str(found[_ELEMENT])

    def _send(self, method: str, path: str, **body: object) -> object:
        answer = self._client.request(method, path, json=body if method == "POST" else None).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, until the block ends.

    Args:
        folder: an empty one, for the profile and downloads.
    """
    # Its port is its own choice, which it prints.
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert driver.stdout is not None
    try:
        found = next(match for line in driver.stdout if (match := re.search(r"on port (\d+)\.$", line.strip())))
        options = {
            "args": [*_FLAGS, f"--user-data-dir={folder / 'profile'}"],
            "prefs": {"download.default_directory": str(folder)},
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}/", timeout=120, trust_env=False) as client:
            answer = client.post("session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in answer, answer
            session = f"session/{answer['sessionId']}"
            client.base_url = client.base_url.join(f"/{session}/")
            try:
                yield Browser(client)
            finally:
                client.delete(f"/{session}")
    finally:
        # The whole group: a browser whose session could not be ended would go on without its driver.
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        driver.stdout.close()
