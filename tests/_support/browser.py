"""A headless Chromium, driven over the WebDriver protocol; nothing but the browser itself is needed."""

import base64
import json
import re
import shutil
import subprocess
from urllib.request import ProxyHandler, Request, build_opener

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
OPENER = build_opener(ProxyHandler({}))
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
LEFT, RIGHT, HOME, END, TAB = "\ue012", "\ue014", "\ue011", "\ue010", "\ue004"


class Browser:
    """One window; a context that ends the browser it started."""

    def __init__(self, profile):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                 f"--user-data-dir={profile}"]  # fmt: skip
        options = {"binary": CHROMIUM, "args": flags}
        self._capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}

    def __enter__(self):
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self._driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                break
        self._root = f"http://127.0.0.1:{found[1]}/session"
        try:
            answer = self._ask("", {"capabilities": {"alwaysMatch": self._capabilities}})
        except BaseException:
            self._end()
            raise
        self._root += f"/{answer['sessionId']}"
        return self

    def __exit__(self, *_):
        try:
            self._ask("", method="DELETE")
        finally:
            self._end()

    def _end(self):
        self._driver.terminate()
        self._driver.wait()
        self._driver.stdout.close()

    def _ask(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        with OPENER.open(request, timeout=60) as response:
            return json.load(response)["value"]

    def devtools(self, command, **parameters):
        """Send a command of the DevTools protocol."""
        return self._ask("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def show(self, path, width, height=900, scheme="light", motion="no-preference"):
        """Open a file in a window of that inner width, and return what the console said."""
        self.devtools("Emulation.setDeviceMetricsOverride",
                      width=width, height=height, deviceScaleFactor=1, mobile=False)  # fmt: skip
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        self.devtools(
            "Emulation.setEmulatedMedia", features=[{"name": k, "value": v} for k, v in features.items()]
        )
        self._ask("/url", {"url": path.absolute().as_uri()})
        return self.console()

    def console(self):
        """Return what the console said since it was asked last."""
        return [entry["message"] for entry in self._ask("/se/log", {"type": "browser"})]

    def run(self, script, *args):
        """Return what a script returns."""
        return self._ask("/execute/sync", {"script": script, "args": list(args)})

    def press(self, selector, *keys):
        """Type into an element."""
        element = self._ask("/element", {"using": "css selector", "value": selector})
        self._ask(f"/element/{element[ELEMENT]}/value", {"text": "".join(keys)})

    def click(self, selector):
        """Click an element where it lies."""
        element = self._ask("/element", {"using": "css selector", "value": selector})
        self._ask(f"/element/{element[ELEMENT]}/click", {})

    def screenshot(self, path, full=True):
        """Write a picture of the whole page."""
        shot = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(shot["data"]))
