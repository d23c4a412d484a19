"""Fixtures that open the page of a report in a browser. Test modules name this one in `pytest_plugins`."""

import os
import shutil

import pytest
from report_browser import written


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "no Chromium here, and the page is checked in one: install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_file(chromium):
    """Opens a page; in the end nothing may have been asked for, logged or run but the page."""
    opened = []

    def open_page(path, width=1280, scheme="light", forced_colors="none"):
        context = chromium.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            forced_colors=forced_colors,
            reduced_motion="reduce",
            has_touch=width < 500,
        )
        context.set_default_timeout(5000)
        page, seen = context.new_page(), []
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url))
        page.goto(path.as_uri())
        opened.append((context, page, path.as_uri(), seen))
        return page

    yield open_page
    for context, page, url, seen in opened:
        assert page.evaluate("typeof ran") == "undefined"
        assert seen == [url]
        context.close()


@pytest.fixture
def show(open_file, tmp_path):
    """Opens the page of a made-up report."""
    made = []

    def open_page(width=1280, scheme="light", forced_colors="none", **options):
        made.append(tmp_path / f"{len(made)}.html")
        routing, samples = written(made[-1], **options)
        return open_file(made[-1], width, scheme, forced_colors), routing, samples

    return open_page
