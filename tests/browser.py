"""A real browser for the tests of pages: Debian's Chromium, without windows where there is that, and any network."""

import shutil
from contextlib import contextmanager
from importlib import resources

import pytest
from playwright.sync_api import Page, sync_playwright

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here (Debian package chromium)")
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
              "--disable-component-update", "--disable-sync",
              # else Plotly is parsed a second time for the lines of errors that it throws and catches
              "--js-flags=--no-enable-lazy-source-positions"]  # fmt: skip


@contextmanager
def opened_browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened_page(browser, path, width=1280, height=900, color_scheme="light"):
    """Open a file, wait until all is drawn, and make sure that no network was asked and nothing complained of.

    All files are opened in the browser's one tab, one after the other, which then need not compile Plotly anew.
    """
    page = browser.contexts[0].pages[0] if browser.contexts else browser.new_context().new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=color_scheme)
    page.mouse.move(0, 0)
    requests, messages = [], []
    listeners = {
        "request": lambda request: requests.append(request.url),
        "console": lambda message: messages.append(message.text),
        "pageerror": lambda error: messages.append(str(error)),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.complaints = messages
    try:
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready=yes]", timeout=30_000)
        yield page
    finally:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    assert not messages, messages


def violations(page: Page):
    """Return what axe finds serious or critical: rule, and the elements concerned."""
    script = (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    found = page.evaluate("async (script) => { eval(script); return await axe.run(); }", script)
    return [
        (one["id"], [node["target"] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def cut_off(page: Page):
    """Return the labels of ticks of which a part lies outside of their picture, or of what can be scrolled to."""
    return page.evaluate(
        """() => [...document.querySelectorAll(".plot [class$=tick] text")].flatMap((text) => {
            const label = text.getBoundingClientRect(), picture = text.ownerSVGElement.getBoundingClientRect();
            const room = text.closest(".scroll") ?? text.closest(".plot"), top = room.getBoundingClientRect().top;
            const inside = picture.left <= label.left && label.right <= picture.right &&
                Math.max(top, picture.top) <= label.top &&
                label.bottom <= Math.min(top + room.clientHeight, picture.bottom);
            return inside ? [] : [`${text.closest(".plot").id}: ${text.textContent}`];
        })"""
    )
