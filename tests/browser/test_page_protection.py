"""The page under the app's headers, and the login, in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import until_quiet

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")

from svft_diffusion.app.serving.logins import MOST_ATTEMPTS, add_login

pytestmark = pytest.mark.browser

PASSWORD = "correct horse"


def test_every_tab_works_under_the_policy(page: Any) -> None:
    for tab in page.get_by_role("tab").all():
        if tab.is_visible():
            tab.click()
            until_quiet(page)
    # The fixture asserts that nothing was refused, and that nobody else was asked.


def test_a_script_that_came_in_as_text_does_not_run(page: Any, problems: list[str]) -> None:
    page.evaluate(
        """() => {
            const holder = document.createElement('div');
            holder.innerHTML = '<img src="nothing" onerror="window.ran = true">';
            const script = document.createElement('script');
            script.textContent = 'window.ran = true';
            const elsewhere = document.createElement('img');
            elsewhere.src = 'https://example.org/picture.png';
            document.body.append(holder, script, elsewhere);
        }"""
    )
    until_quiet(page)
    assert page.evaluate("window.ran") is None
    refused = [problem for problem in problems if "Content Security Policy" in problem]
    assert any("script" in problem for problem in refused) and any("img-src" in problem for problem in refused)
    problems.clear()


def test_login(start_server: Any, new_page: Any, problems: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("login")
    add_login(folder / "logins", "ada", PASSWORD)
    server = start_server("--auth_file", str(folder / "logins"), folder=folder)
    page = new_page()
    page.goto(server.address)

    def log_in(password: str) -> int:
        page.get_by_label("username").fill("ada")
        page.get_by_label("password").fill(password)
        with page.expect_response("**/login") as response:
            page.get_by_role("button", name="Login").click()
        return int(response.value.status)

    assert log_in("wrong horse") == 400
    page.get_by_text("Incorrect credentials").wait_for()
    assert page.locator("#title").count() == 0
    assert log_in(PASSWORD) == 200
    page.wait_for_selector("#title")

    page = new_page()
    page.goto(server.address)
    statuses = [log_in(f"wrong horse {number}") for number in range(MOST_ATTEMPTS)]
    assert statuses == [400] * (MOST_ATTEMPTS - 1) + [429]
    assert log_in(PASSWORD) == 429
    page.get_by_text("After five wrong passwords").wait_for()
    # The browser reports every refused login; nothing else may have gone wrong.
    assert all("status of 4" in problem for problem in problems), problems
    problems.clear()
