"""The app in a process of its own, and a browser that hears everything that goes wrong in it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx
import pytest
from training_jobs import has_ended, wait

from svft_diffusion.app.jobs.training_jobs import TrainingJobs
from svft_diffusion.settings import config_from_mapping
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.presets import SubjectPrompts, preset_settings

SAMPLES = Path(__file__).parent.parent.parent / "samples"
TABS = ("Generate", "Blend", "Train", "Library", "Compare")
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"viewport": DESKTOP, "color_scheme": "light"},
    "dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "phone": {"viewport": PHONE, "color_scheme": "light"},
    "dark phone": {"viewport": PHONE, "color_scheme": "dark"},
}

# The last ones keep the browser itself from asking other hosts.
CHROMIUM_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "/usr/bin/chromium", "google-chrome")
_SECONDS_TO_START = 180.0
_SECONDS_TO_TRAIN = 600.0
_SECONDS_TO_BE_QUIET = 120.0
_SECONDS_OF_A_LEFT_STREAM = 20.0
_HEARTBEAT = "/heartbeat"  # stays open as long as the page
_STREAM = "/queue/data"
# By the page's own clock: what it had put off for less than that has begun by then, however slow it is.
_HALF_A_SECOND = "() => new Promise((done) => setTimeout(done, 500))"

# What Gradio's client says of requests that a reload breaks off.
_BROKEN_OFF = ("BodyStreamBuffer was aborted", "Connection errored out")

StartServer = Callable[..., "Server"]
NewPage = Callable[..., Any]


@dataclass(frozen=True)
class Server:
    """A running app."""

    address: str  # ends in a slash
    adapters_dir: Path
    output_dir: Path
    log: Path
    process: subprocess.Popen[bytes]


@dataclass
class Traffic:
    """The requests of a page: how many have begun, and those that have not ended."""

    begun: int = 0
    under_way: set[Any] = field(default_factory=set)

    def begin(self, request: Any) -> None:
        if _HEARTBEAT not in request.url:
            self.begun += 1
            self.under_way.add(request)

    def end(self, request: Any) -> None:
        self.under_way.discard(request)

    def only_streams(self) -> bool:
        return all(_STREAM in request.url for request in self.under_way)


_traffic: WeakKeyDictionary[Any, Traffic] = WeakKeyDictionary()


def follow_requests(page: Any) -> None:
    """What `until_quiet` needs, from a page's first request on; `new_page` has done it."""
    traffic = _traffic[page] = Traffic()
    page.on("request", traffic.begin)
    page.on("requestfinished", traffic.end)
    page.on("requestfailed", traffic.end)


def until_quiet(page: Any) -> None:
    """Wait until all that the page has asked for is there and it has asked for nothing more for half a second.

    Gradio closes its stream of results when nothing is left to be done, so that an open one means work, too. It
    leaves one open for good where a result has come before the answer that names it; that one has to be silent long.
    """
    traffic = _traffic[page]
    began = latest = time.monotonic()
    while True:
        begun = traffic.begun
        page.evaluate(_HALF_A_SECOND)
        now = time.monotonic()
        if traffic.begun != begun:
            latest = now
        elif not traffic.under_way or (traffic.only_streams() and now - latest > _SECONDS_OF_A_LEFT_STREAM):
            return
        assert now - began < _SECONDS_TO_BE_QUIET, f"still asks: {[request.url for request in traffic.under_way]}"


def reload(page: Any, problems: list[str]) -> None:
    """Load the page anew, whatever it is still asking for."""
    before = len(problems)
    page.reload()
    problems[before:] = [one for one in problems[before:] if not any(said in one for said in _BROKEN_OFF)]


def _missing(what: str) -> None:
    """Skip, unless browser tests were asked for by name: then a machine without a browser must not look fine."""
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(what)
    pytest.skip(what)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(folder: Path, *options: str) -> Server:
    """The app on the embedded model, with all that it writes below ``folder``."""
    adapters_dir, output_dir, log = folder / "adapters", folder / "pictures", folder / "log.txt"
    port = free_port()
    command = [sys.executable, "-m", "svft_diffusion", "app", "--server_port", str(port)]
    command += ["--adapters_dir", str(adapters_dir), "--output_dir", str(output_dir), *options]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    server = Server(f"http://127.0.0.1:{port}/", adapters_dir, output_dir, log, process)
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(server.address)
            return server
        except httpx.TransportError:
            time.sleep(0.1)
    _end(process)
    raise AssertionError(f"the app did not start:\n{log.read_text(encoding='utf-8', errors='replace')}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Starts apps with more options: ``start_server("--auth_file", file, folder=...)``."""
    servers: list[Server] = []

    def start(*options: str, folder: Path | None = None) -> Server:
        servers.append(_start(tmp_path_factory.mktemp("app") if folder is None else folder, *options))
        return servers[-1]

    yield start
    for server in servers:
        _end(server.process)


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    """One app for all tests of a module."""
    return start_server()


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An app in use: a short training of the sample robot has finished in it."""
    folder = tmp_path_factory.mktemp("furnished")
    jobs = TrainingJobs(folder / "adapters" / "training")
    settings = preset_settings("toybox", "quick", SubjectPrompts("sks", "robot"), folder)
    settings |= {"instance_data_dir": SAMPLES, "max_train_steps": 45, "validation_steps": 15, "history_steps": 15}
    job = jobs.start(config_from_mapping(TrainingConfig, settings), "robot")
    assert wait(jobs, job, has_ended, seconds=_SECONDS_TO_TRAIN).state == "finished"
    server = _start(folder)
    yield server
    _end(server.process)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium: the system's, or the one that Playwright has installed."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing('browser tests need Playwright: pip install "svft-diffusion[browser-tests]", or `make test-browser`')
    with sync_playwright() as playwright:
        system = next((found for name in BROWSERS if (found := shutil.which(name))), None)
        if system is None and not Path(playwright.chromium.executable_path).exists():
            _missing("browser tests need Chromium: install the system's package, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=system, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def problems() -> list[str]:
    """What went wrong on the pages of the test. A test that provokes an error takes it out."""
    return []


@pytest.fixture
def new_page(browser: Any, problems: list[str]) -> Iterator[NewPage]:
    """Makes pages of visitors that share nothing: ``new_page(viewport={...}, color_scheme="dark")``.

    The test fails on any error in a console, any dialog of a script, and any request to another host.
    """
    contexts: list[Any] = []

    def make(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        follow_requests(page)
        page.on("console", lambda message: message.type == "error" and problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"script: {error}"))
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))

        def watch(route: Any) -> None:
            address = urlsplit(route.request.url)
            if address.hostname in ("127.0.0.1", "localhost"):
                route.fallback()
            else:
                problems.append(f"another host: {route.request.url}")
                route.abort()

        context.route(lambda address: address.startswith(("http:", "https:", "ws:", "wss:")), watch)
        return page

    yield make
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(new_page: NewPage, server: Server) -> Any:
    """A visitor who has opened the app of the module."""
    page = new_page()
    page.goto(server.address)
    page.wait_for_selector("#title")
    return page


def open_tab(page: Any, name: str) -> None:
    """Show a tab, whole: what can be opened in it is opened."""
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_selector(f"#tab-{name.lower()}", state="visible")
    if name == "Library":
        page.wait_for_selector("#library-list .fit")
        page.wait_for_function("!document.querySelector('#library-list .fit.unknown')")
    if name == "Train":
        page.wait_for_selector("#training-samples img, #training-step-samples img")
    closed = page.locator(f"#tab-{name.lower()} button.label-wrap:not(.open):visible")
    while closed.count():
        closed.first.click()
    page.wait_for_timeout(500)  # until nothing moves any more


def draw_with_adapters(page: Any, *, steps: int = 2, pictures: int = 2) -> None:
    """Put the trained robot and an earlier step of it onto cards, open its details, and draw."""
    library = page.get_by_role("tab", name="Library", exact=True)
    cards = page.locator("#adapter-cards .card")
    library.click()
    page.get_by_role("button", name="Add robot-1 to Generate", exact=True).click()
    page.get_by_text("robot-1 is on Generate now").wait_for()
    page.get_by_role("button", name="Details of robot-1", exact=True).click()
    page.get_by_label("Steps that its training kept").click()
    page.get_by_role("option", name="step 30", exact=True).click()
    page.get_by_role("button", name="Add this step to Generate", exact=True).click()
    page.get_by_text("robot-1-step-30 is on Generate now").wait_for()
    page.get_by_role("tab", name="Generate", exact=True).click()
    cards.nth(1).wait_for()
    for name, value in (("prompt", "a photo of sks robot on the beach"), ("steps", steps), ("num-images", pictures)):
        page.locator(f"#{name} :is(input, textarea)").first.fill(str(value))
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_function(
        "count => document.querySelectorAll('#pictures .thumbnail-item').length === count", arg=pictures, timeout=60_000
    )
    page.wait_for_selector("#drawing .drawing", state="hidden")
