"""A real browser for a test: headless Chromium, driven over its own pipe (DevTools protocol), so no package
is needed.

Chromium reads commands from file descriptor 3 and writes answers and events to 4, JSON ended by a zero byte.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM = CHROMIUM if shutil.which("bash") else None


class Browser:
    """One page of a headless browser. `events` holds all that it said: console lines, exceptions,
    requests."""

    def __init__(self, folder):
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "about:blank",
        ]
        here, there = os.pipe(), os.pipe()
        ends = [
            fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (here[0], there[1])
        ]  # off 3 and 4, whoever has these
        # The shell puts the two ends where Chromium looks for them; bash, as others know descriptors of one
        # digit only.
        line = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, "bash", CHROMIUM, *flags],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (here[0], there[1], *ends):
            os.close(end)
        self.input, self.output, self.waiting, self.events, self.last = here[1], there[0], b"", [], 0
        self.session = None
        page = next(t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def read(self, seconds=60):
        """The next message; TimeoutError where none comes."""
        end = time.monotonic() + seconds
        while b"\0" not in self.waiting:
            if not select.select([self.output], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            if not (more := os.read(self.output, 1 << 20)):
                raise EOFError("the browser has gone")
            self.waiting += more
        message, self.waiting = self.waiting.split(b"\0", 1)
        return json.loads(message)

    def ask(self, method, **params):
        """One command -> its result; events that come meanwhile are kept."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        left = json.dumps(message).encode() + b"\0"
        while left:
            left = left[os.write(self.input, left) :]
        while (answer := self.read()).get("id") != self.last:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(answer["error"]["message"])
        return answer["result"]

    def open(self, file, width=1100, height=900, dark=False, phone=False):
        """Load a file and wait until it has run."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.events.clear()
        self.ask("Page.navigate", url=file.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def run(self, script):
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def place(self, selector):
        """The middle of the first element that matches, scrolled into view."""
        self.run(
            f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', behavior: 'instant'}})"
        )
        return self.run(
            f"(b => [b.x + b.width / 2, b.y + b.height / 2])"
            f"(document.querySelector({selector!r}).getClientRects()[0])"
        )

    def point(self, selector):
        """Move the mouse there."""
        x, y = self.place(selector)
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        """A real click: pressed and let go where the element is, whatever lies above it."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        """A key, at what has the focus."""
        codes = {
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "Home": 36,
            "End": 35,
            "Tab": 9,
        }
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def complaints(self):
        """Errors and warnings of the console, broken policies and uncaught exceptions since the page was
        opened."""
        said = [e["params"] for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        said += [e["params"] for e in self.events if e.get("method") == "Runtime.consoleAPICalled"]
        return said + [e["params"]["entry"] for e in self.events if e.get("method") == "Log.entryAdded"]

    def requests(self):
        """Addresses that were asked for, but for the page itself and what it holds (data:)."""
        asked = [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith(("data:", "about:"))][1:]

    def screenshot(self, file, whole=False):
        """A PNG of what is in view, or of the whole page."""
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))

    def close(self):
        """Ends the browser and waits for it."""
        try:
            self.ask("Browser.close")
        except (EOFError, OSError, TimeoutError):
            pass
        os.close(self.input)
        os.close(self.output)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
