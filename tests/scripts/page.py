#!/usr/bin/env python3
"""Uses the page of `t5gemma serve` in headless Chromium as a person would: `page.py CHROMIUM HOST:PORT FOLDER`, where the server has the
model `demo` with alignment. Writes screenshots into FOLDER and prints `page` if everything is there."""

import base64
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time


class Browser:
    """Chromium by its debugging protocol, over a pair of pipes."""

    def __init__(self, program, profile):
        to_read, self.to = os.pipe()
        self.source, to_write = os.pipe()
        # The protocol's ends are 3 and 4.
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--window-size=1100,1500", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
        self.process = subprocess.Popen(["bash", "-c", command, program, *flags], pass_fds=[to_read, to_write], stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.number, self.rest, self.events = 0, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.rest:
            piece = os.read(self.source, 1 << 16)
            assert piece, "Chromium has ended"
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression}: {self.evaluate('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def screenshot(self, path, full=True):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))

    def problems(self):
        """What the page has complained of, and what it has asked of others."""
        self.evaluate("1")
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown" or event.get("method") == "Log.entryAdded":
                found.append(json.dumps(parameters))
            if event.get("method") == "Network.requestWillBeSent":
                found += [url for url in [parameters["request"]["url"]] if not url.startswith(("http://127.0.0.1", "about:", "data:"))]
        return found


def main():
    program, address, folder = sys.argv[1:]
    folder = pathlib.Path(folder)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            use(browser, address, folder)
        finally:
            browser.process.kill()
            browser.process.wait()
    print("page")


def use(browser, address, folder):
    browser.call("Page.navigate", url=f"http://{address}/")
    browser.wait_for("document.getElementById('model')?.options.length > 0")
    browser.wait_for("document.querySelectorAll('#running tbody tr').length == 1")
    set_to = "(id, value) => { const it = document.getElementById(id); if (it.type == 'checkbox') it.checked = value; else it.value = value; it.dispatchEvent(new Event('input', {bubbles: true})); }"
    given = {"source": "Dr. Smith paid $3.50 on May 3, 2019.", "beams": "4", "targets": "3", "tokens": "60", "align": True}
    for name, value in given.items():
        browser.evaluate(f"({set_to})({json.dumps(name)}, {json.dumps(value)})")
    # How the text grows.
    browser.evaluate("window.seen = []; new MutationObserver(() => seen.push(document.getElementById('text').innerText)).observe(document.getElementById('text'), {childList: true, characterData: true, subtree: true})")
    browser.evaluate("document.getElementById('form').requestSubmit()")
    browser.wait_for("document.getElementById('facts').textContent != ''")
    seen = [text for text in browser.evaluate("seen") if text]
    assert len(set(seen)) > 3 and all(later.startswith(earlier.strip()) for earlier, later in zip(seen, seen[1:])), seen
    assert browser.evaluate("document.getElementById('text').innerText").startswith("doctor smith paid"), seen
    assert browser.evaluate("document.querySelectorAll('#others li').length") == 2
    rows, columns = browser.evaluate("[document.querySelectorAll('#attention tbody tr').length, document.querySelectorAll('#attention tbody tr:first-child td').length]")
    assert rows > 5 and columns > 5, (rows, columns)
    # The token that a target token looks at most is that of the same word, somewhere.
    assert browser.evaluate("[...document.querySelectorAll('#attention tbody td')].some(it => +it.dataset.weight > 0.3)")
    for form, part in [("curl", "curl http"), ("Python", "urllib.request"), ("JSON", '"num_beams": 4')]:
        browser.evaluate(f"({set_to})('form-of', {json.dumps(form)})")
        assert part in browser.evaluate("document.getElementById('request').textContent"), form
    browser.screenshot(folder / "page.png")
    # One beam, with what else might have been at each token.
    for name, value in {"beams": "1", "targets": "1", "align": False, "alternatives": "3"}.items():
        browser.evaluate(f"({set_to})({json.dumps(name)}, {json.dumps(value)})")
    browser.evaluate("document.getElementById('form').requestSubmit()")
    browser.wait_for("document.querySelectorAll('#text span[title]').length > 5")
    assert "%" in browser.evaluate("document.querySelector('#text span[title]').title")
    browser.evaluate(f"({set_to})('source', '')")
    browser.evaluate(f"({set_to})('beams', '999')")
    browser.evaluate(f"({set_to})('source', 'a')")
    browser.evaluate("document.getElementById('form').noValidate = true; document.getElementById('form').requestSubmit()")
    assert "beams" in browser.wait_for("document.getElementById('error').textContent")
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.screenshot(folder / "dark.png")
    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=1, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page is wider than a telephone"
    browser.screenshot(folder / "narrow.png")
    problems = [problem for problem in browser.problems() if "400 (Bad Request)" not in problem]
    assert not problems, problems


if __name__ == "__main__":
    main()
