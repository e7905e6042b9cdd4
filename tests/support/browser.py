"""A real browser for tests of pages: Debian's Chromium, or Chrome, driven by selenium through chromedriver. Without one
the tests fail and say what to install: a page that was looked at by no browser is not tested."""

import json
import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

BROWSERS = ("chromium", "google-chrome", "chrome")


def open_browser(profile: Path, downloads: Path, **preferences) -> webdriver.Chrome:
    """A browser without a window, whose profile (and so its localStorage) is kept in a folder. It has no network: every
    name and address but files' is unreachable.

    preferences: of the profile, with "__" for a dot.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.fail(
            "no Chromium with chromedriver is installed, and the pages must be tested in a real browser:"
            " apt-get install chromium chromium-driver (.ci/run does that)",
            pytrace=False,
        )
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "no-first-run"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("--proxy-server=127.0.0.1:9")  # nobody listens there
    options.add_argument("--disable-background-networking")
    settings = {"download.default_directory": str(downloads), "download.prompt_for_download": False}
    settings |= {name.replace("__", "."): value for name, value in preferences.items()}
    options.add_experimental_option("prefs", settings)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def requested_addresses(browser: webdriver.Chrome) -> list[str]:
    """The addresses that the current tab has asked for since this was last called, without those of the browser's
    own pages, as chrome://new-tab-page."""
    addresses = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] != "Network.requestWillBeSent":
            continue
        if not message["params"]["documentURL"].startswith("chrome"):
            addresses.append(message["params"]["request"]["url"])
    return addresses
