"""What the app refuses, and what it says in answers; on a small page, for the protection knows nothing of pages."""

from __future__ import annotations

import http.client
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import httpx
import pytest

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

from svft_diffusion.app.config import AppConfig  # noqa: E402
from svft_diffusion.app.serving.launch import launch  # noqa: E402
from svft_diffusion.app.serving.logins import (  # noqa: E402
    MOST_ATTEMPTS,
    SECONDS,
    Attempts,
    StoredPassword,
    add_login,
    read_logins,
)
from svft_diffusion.app.serving.security import MOST_BYTES_OF_A_MESSAGE  # noqa: E402
from svft_diffusion.app.serving.served import blocked_paths, served_copy  # noqa: E402
from svft_diffusion.cli.main import run_command  # noqa: E402
from svft_diffusion.errors import UserError  # noqa: E402

MB = 2**20
MOST_UPLOAD_MB = 4
PASSWORD = "correct horse"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def small_page() -> Any:
    with gradio.Blocks(analytics_enabled=False) as page:
        path, shown = gradio.Textbox(), gradio.Image()
        gradio.Button().click(lambda text: text, path, shown, api_name="echo")
        gradio.Button().click(lambda text: 1 // 0, path, path, api_name="fail")
    return page


class Running:
    """A small app, with a cache of uploads of its own."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.config = AppConfig(
            adapters_dir=folder / "adapters",
            output_dir=folder / "pictures",
            server_port=free_port(),
            max_upload_mb=MOST_UPLOAD_MB,
            **options,
        )
        for below in (self.config.training_dir / "job", self.config.uploads_dir, self.config.output_dir):
            below.mkdir(parents=True)
        self.page = small_page()
        self.address = launch(self.page, self.config, wait=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("app"))
    yield running
    running.page.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guarded")
    add_login(folder / "logins", "ada", PASSWORD)
    add_login(folder / "logins", "grace", PASSWORD + " battery")
    running = Running(folder, auth_file=folder / "logins")
    yield running
    running.page.close()


def log_in(app: Running, name: str, password: str) -> httpx.Response:
    return httpx.post(f"{app.address}login", data={"username": name, "password": password})


def policy_of(answer: httpx.Response) -> dict[str, list[str]]:
    parts = [part.split() for part in answer.headers["content-security-policy"].split(";")]
    return {name: sources for name, *sources in parts}


@pytest.mark.parametrize("path", ["", "config", "gradio_api/info", "nothing", "gradio_api/file=/etc/passwd", "login"])
def test_every_answer_has_the_headers(app: Running, path: str) -> None:
    answer = httpx.get(f"{app.address}{path}")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert "camera=()" in answer.headers["permissions-policy"]
    policy = policy_of(answer)
    assert policy["frame-ancestors"] == ["'none'"]
    allowed = {source for sources in policy.values() for source in sources}
    assert not any("." in source or "*" in source or source.startswith("http") for source in allowed)
    assert "'unsafe-inline'" not in policy.get("script-src", policy["default-src"])


def test_scripts_of_the_page_are_marked_anew_each_time(app: Running) -> None:
    nonces = set()
    for _ in range(2):
        answer = httpx.get(app.address)
        (nonce,) = (source[1:-1] for source in policy_of(answer)["script-src"] if source.startswith("'nonce-"))
        assert answer.text.count("<script") == answer.text.count(f'<script nonce="{nonce[6:]}"') > 2
        nonces.add(nonce)
    assert len(nonces) == 2


def test_other_names_of_this_machine_are_refused(app: Running, guarded: Running) -> None:
    port = app.config.server_port
    for host in ("example.org", f"example.org:{port}", "127.0.0.1.example.org", "localhost.example.org", ""):
        assert httpx.get(app.address, headers={"Host": host}).status_code in (400, 421), host
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert httpx.get(app.address, headers={"Host": host}).status_code == 200, host
    # With a login it may stand behind a proxy under any name.
    assert httpx.get(guarded.address, headers={"Host": "example.org"}).status_code == 200


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "name", ["127.0.0.2", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]
)
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no 127.0.0.2 by itself")
def test_every_address_of_this_machine_alone_can_be_listened_on(cache: Path, tmp_path: Path, name: str) -> None:
    running = Running(tmp_path, server_name=name)
    try:
        assert httpx.get(running.address).status_code == 200
        assert httpx.get(running.address, headers={"Host": "example.org"}).status_code == 421
    finally:
        running.page.close()


def test_other_sites_cannot_send_anything(app: Running) -> None:
    address = f"{app.address}gradio_api/call/echo"
    for site, status in (("cross-site", 403), ("same-origin", 200)):
        assert httpx.post(address, json={"data": [""]}, headers={"Sec-Fetch-Site": site}).status_code == status
    assert httpx.get(app.address, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link


def multipart(sizes: list[int], chunk: bytes = b"x" * 65536) -> Iterator[bytes]:
    for number, size in enumerate(sizes):
        yield (
            b'--edge\r\nContent-Disposition: form-data; name="files"; filename="%d.png"\r\n'
            b"Content-Type: image/png\r\n\r\n" % number
        )
        for start in range(0, size, len(chunk)):
            yield chunk[: size - start]
        yield b"\r\n"
    yield b"--edge--\r\n"


def send_chunked(app: Running, path: str, body: Iterator[bytes]) -> tuple[int | None, int]:
    """Status and the number of bytes that the server took; None for a connection that was closed without one."""
    connection = http.client.HTTPConnection("127.0.0.1", app.config.server_port, timeout=60)
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", "multipart/form-data; boundary=edge")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent = 0
    try:
        for piece in body:
            connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            sent += len(piece)
        connection.send(b"0\r\n\r\n")
    except OSError:
        pass
    try:
        return connection.getresponse().status, sent
    except (OSError, http.client.HTTPException):
        return None, sent
    finally:
        connection.close()


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def largest_while(folder: Path, ended: threading.Event, seen: list[int]) -> None:
    while not ended.wait(0.005):
        seen.append(sum(file.stat().st_size for file in list(folder.iterdir()) if file.is_file()))


def test_a_gigabyte_without_a_length_is_refused_early(app: Running, cache: Path) -> None:
    before, ended, seen = set(files_in(cache)), threading.Event(), [0]
    watcher = threading.Thread(target=largest_while, args=(cache, ended, seen))
    watcher.start()
    try:
        status, sent = send_chunked(app, "/gradio_api/upload", multipart([1024 * MB]))
    finally:
        ended.set()
        watcher.join()
    assert status in (413, None)  # None: closed while we were still sending
    assert sent < (MOST_UPLOAD_MB + 32) * MB  # the rest are buffers of the two sockets
    assert max(seen) <= MOST_UPLOAD_MB * MB
    assert set(files_in(cache)) == before


def test_uploads_have_a_size_in_all(app: Running, cache: Path) -> None:
    whole = [MOST_UPLOAD_MB * MB // 2 - 1024] * 2
    assert send_chunked(app, "/gradio_api/upload", multipart(whole))[0] == 200
    before = set(files_in(cache))
    assert send_chunked(app, "/gradio_api/upload", multipart([MB] * MOST_UPLOAD_MB))[0] == 413
    told = httpx.post(
        f"{app.address}gradio_api/upload", files={"files": ("a.png", b"x" * (MOST_UPLOAD_MB * MB + 1), "image/png")}
    )
    assert told.status_code == 413 and "4 MB" in told.text
    assert httpx.get(app.address).status_code == 200
    assert set(files_in(cache)) == before


def test_an_upload_that_is_broken_off_leaves_nothing(app: Running, cache: Path) -> None:
    before = set(files_in(cache))
    connection = http.client.HTTPConnection("127.0.0.1", app.config.server_port)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Type", "multipart/form-data; boundary=edge")
    connection.putheader("Content-Length", str(3 * MB))
    connection.endheaders()
    for piece, _ in zip(multipart([3 * MB]), range(20), strict=False):
        connection.send(piece)
    deadline = time.monotonic() + 20
    while set(files_in(cache)) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(files_in(cache)) != before  # it had begun
    connection.close()
    while set(files_in(cache)) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(files_in(cache)) == before


def test_messages_are_no_uploads(app: Running) -> None:
    # An event may be called as uploads are.
    for path in ("/gradio_api/call/echo", "/gradio_api/call/upload", "/gradio_api/queue/join", "/login"):
        status, sent = send_chunked(app, path, multipart([1024 * MB]))
        assert status in (413, 400, 422, None) and sent < MOST_BYTES_OF_A_MESSAGE + 32 * MB, path
    for name in ("echo", "upload"):
        big = httpx.post(f"{app.address}gradio_api/call/{name}", content=b" " * (MOST_BYTES_OF_A_MESSAGE + 1))
        assert big.status_code == 413, name


TRAVERSALS = [
    prefix + rest
    for prefix in ("/", "//", "../", "..%2f", "%2e%2e/", "..\\", "....//", "/proc/self/cwd/", "file:///", "~/", "C:\\")
    for rest in ("etc/passwd", "../../etc/passwd", "pyproject.toml", "Windows/win.ini", "root/.ssh/id_rsa", ".")
] + [
    "/etc/passwd%00.png",
    "/etc/passwd\u2024png",
    "\\\\host\\share\\file",
    "http://127.0.0.1:1/",
    "",
    "CON",
    "\uff0e\uff0e/etc",
]


def test_pictures_alone_are_served(app: Running) -> None:
    picture = app.config.output_dir / "00001.png"
    secret = app.config.uploads_dir / "secret.png"
    photo = app.config.training_dir / "job" / "photo.png"
    for file in (picture, secret, photo, app.folder / "logins", Path("pyproject.toml").absolute()):
        if not file.exists():
            file.write_bytes(b"content")
    served = httpx.get(f"{app.address}gradio_api/file={picture}")
    assert served.status_code == 200 and served.content == b"content"
    assert "sandbox" in policy_of(served)
    ways_out = [app.config.output_dir / ".." / "adapters" / "uploads" / "secret.png"]
    if os.name == "posix":
        (app.config.output_dir / "link.png").symlink_to(secret)
        ways_out.append(app.config.output_dir / "link.png")
    targets = [str(one) for one in (secret, photo, app.folder / "logins", Path("pyproject.toml").absolute(), *ways_out)]
    visitor = httpx.Client()
    for target in [*targets, *TRAVERSALS]:
        for spelled in {target, quote(target), quote(target, safe="")}:
            try:
                answer = visitor.get(f"{app.address}gradio_api/file={spelled}")
            except (httpx.InvalidURL, UnicodeError):
                continue
            assert answer.status_code in (400, 403, 404, 422), (spelled, answer.status_code)
            assert b"root:" not in answer.content and b"[project]" not in answer.content
    copy = served_copy(secret)
    assert httpx.get(f"{app.address}gradio_api/file={copy}").content == b"content"


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_a_link_to_the_pictures_hides_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # whose files are served
    pictures = tmp_path / "outputs" / "app"
    pictures.mkdir(parents=True)
    (tmp_path / "notes").touch()
    (tmp_path / "shortcut").symlink_to(pictures)
    (tmp_path / "other").symlink_to(tmp_path / "notes")
    blocked = blocked_paths(AppConfig(adapters_dir=Path("outputs"), output_dir=Path("outputs/app")))
    assert {str(tmp_path / name) for name in ("notes", "other", "outputs/training")} <= set(blocked)
    assert not any(pictures.is_relative_to(Path(path).resolve()) for path in blocked)


def test_a_handler_that_returned_a_path_would_hand_out_no_file(app: Running) -> None:
    visitor = gradio_client.Client(app.address, verbose=False)
    secret = app.config.uploads_dir / "picture.png"
    secret.write_bytes(b"content")
    for path in (secret, Path("samples/01.png"), Path("samples/01.png").absolute(), Path("/etc/hostname")):
        with pytest.raises(Exception, match="show_error"):
            visitor.predict(str(path), api_name="/echo")


def test_errors_tell_no_trace(app: Running) -> None:
    event = httpx.post(f"{app.address}gradio_api/call/fail", json={"data": ["x"]}).json()["event_id"]
    told = httpx.get(f"{app.address}gradio_api/call/fail/{event}", timeout=30).text
    assert "event: error" in told
    strange = httpx.post(f"{app.address}gradio_api/queue/join", json={"data": [], "fn_index": 10**9, "session_hash": 3})
    for text in (told, strange.text):
        assert "Traceback" not in text and "ZeroDivision" not in text and ".py" not in text


def test_five_wrong_passwords_a_minute(guarded: Running) -> None:
    assert httpx.get(f"{guarded.address}config").status_code == 401
    assert httpx.get(f"{guarded.address}gradio_api/file={guarded.config.output_dir}/x.png").status_code == 401
    assert httpx.post(f"{guarded.address}gradio_api/queue/join", json={"data": []}).status_code == 401
    assert httpx.post(f"{guarded.address}gradio_api/upload", files={"files": b"x"}).status_code == 401
    for _ in range(MOST_ATTEMPTS + 1):  # the right ones don't count
        assert log_in(guarded, "ada", PASSWORD).status_code == 200
    for number in range(MOST_ATTEMPTS):
        answer = log_in(guarded, ("ada", "nobody")[number % 2], "wrong horse")
        assert answer.status_code == 400 and "Incorrect" in answer.text
    for name in ("ada", "grace", "nobody"):  # this address has had its share
        answer = log_in(guarded, name, PASSWORD)
        assert answer.status_code == 429 and 0 < int(answer.headers["retry-after"]) <= SECONDS + 1
        assert "set-cookie" not in answer.headers


def test_attempts_count_by_address_and_by_name() -> None:
    now = 0.0
    attempts = Attempts(lambda: now)
    for number in range(MOST_ATTEMPTS):
        now = float(number)
        assert attempts.begin(f"address {number}", "name ada") is None
    assert attempts.begin("address 9", "name ada") == pytest.approx(SECONDS - now)
    assert attempts.begin("address 9", "name grace") is None
    now = SECONDS + 0.5
    assert attempts.begin("address 9", "name ada") is None  # the first is forgotten
    assert attempts.begin("address 9", "name ada") is not None
    attempts.succeeded("address 9", "name ada")
    assert attempts.begin("address 9", "name ada") is None
    now += 2 * SECONDS
    attempts.begin("address 1")
    assert set(attempts._times) == {"address 1"}  # nothing is kept of those who are gone


def test_the_file_of_logins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "logins"
    add_login(file, "Ada Lovelace", PASSWORD)
    add_login(file, "Грейс", PASSWORD)
    if os.name == "posix":
        assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text(encoding="utf-8")
    assert PASSWORD not in text and len({line.split(":")[3] for line in text.splitlines()}) == 2  # salted
    logins = read_logins(file)
    assert list(logins) == ["Ada Lovelace", "Грейс"]
    assert logins["Грейс"].belongs_to(PASSWORD) and not logins["Грейс"].belongs_to(PASSWORD + " ")
    for name, password in (("Грейс", PASSWORD), ("a:b", PASSWORD), (" a", PASSWORD), ("", PASSWORD), ("b", "short")):
        with pytest.raises(UserError):
            add_login(file, name, password)
    assert file.read_text(encoding="utf-8") == text
    for bad in ("ada:secret", "ada:scrypt:00:00", text.splitlines()[0][:-1], ""):
        (tmp_path / "bad").write_text(f"# people\n{bad}\n", encoding="utf-8")
        with pytest.raises(UserError, match="--add_login"):
            read_logins(tmp_path / "bad")
    assert not StoredPassword.of("a").belongs_to("")

    # Edited by hand: a mark at the beginning, as Notepad writes it, and no end of the last line.
    file.write_bytes(b"\xef\xbb\xbf" + text.rstrip("\n").encode())
    add_login(file, "grace", PASSWORD)
    assert list(read_logins(file)) == ["Ada Lovelace", "Грейс", "grace"]
    file.write_text(f"{text}{text}", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 3 of .* a second login of Ada Lovelace"):
        read_logins(file)
    (tmp_path / "bad").write_text("# people\n", encoding="utf-8")
    add_login(tmp_path / "bad", "grace", PASSWORD)
    assert list(read_logins(tmp_path / "bad")) == ["grace"]
    file.write_text(text, encoding="utf-8")

    monkeypatch.setattr("sys.stdin", (tmp_path / "typed").open("w+", encoding="utf-8"))
    (tmp_path / "typed").write_text(f"{PASSWORD}\n", encoding="utf-8")
    assert run_command("app", ["--add_login", "alan", "--auth_file", str(file)]) == 0
    assert read_logins(file)["alan"].belongs_to(PASSWORD)
    assert PASSWORD not in capsys.readouterr().out
    assert run_command("app", ["--add_login", "alan"]) == 2
    assert "--auth_file" in capsys.readouterr().err


def test_other_machines_are_let_in_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("0.0.0.0", "192.168.0.2", "::", "", "example.org"):
        assert run_command("app", ["--server_name", address]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "--allow_public" in message and message.count("\n") == 1
        assert AppConfig(server_name=address, allow_public=True).open_to_others
        assert AppConfig(server_name=address, auth_file=tmp_path / "logins").open_to_others
    for address in ("127.0.0.1", "127.8.0.1", "localhost", "::1", "[::1]"):
        assert not AppConfig(server_name=address).open_to_others


def test_settings_that_would_open_more_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--adapters_dir", str(tmp_path), "--output_dir", str(tmp_path)], "is in it"),
        (["--adapters_dir", str(tmp_path / "a" / "b"), "--output_dir", str(tmp_path / "a")], "is in it"),
        (["--adapters_dir", str(tmp_path / "a"), "--output_dir", str(tmp_path / "a" / "b" / "..")], "is in it"),
        (["--adapters_dir", str(tmp_path / "a"), "--output_dir", str(tmp_path / "a" / "training" / "x")], "is in it"),
        (["--output_dir", str(tmp_path), "--auth_file", str(tmp_path / "logins")], "--auth_file"),
        (["--server_port", "70000"], "from 1 to 65535"),
        (["--server_port", "0"], "from 1 to 65535"),
        (["--max_upload_mb", "0"], "at least 1"),
        (["--max_pixels", "-5"], "at least 1"),
        (["--mcp_server", "--auth_file", str(tmp_path / "logins")], "MCP"),
    ]
    for arguments, reason in cases:
        assert run_command("app", arguments) == 2
        message = capsys.readouterr().err
        assert reason in message and message.count("\n") == 1
    config = AppConfig(adapters_dir=tmp_path, output_dir=tmp_path / "pictures")
    with pytest.raises(UserError, match="logins"):
        launch(small_page(), AppConfig(auth_file=tmp_path / "none", output_dir=config.output_dir), wait=False)


def test_visitors_from_elsewhere_choose_among_the_offered_bases() -> None:
    own = AppConfig(base=["first", "second", "first"])
    assert own.bases == ("toybox", "first", "second")
    assert own.offered_base("/any/folder") == "/any/folder" and own.offered_base(" ") == "toybox"
    public = AppConfig(base=["first"], server_name="0.0.0.0", allow_public=True)
    assert public.offered_base("first") == "first" and public.offered_base("") == "toybox"
    for other in ("/any/folder", "owner/model", "../toybox", "First"):
        with pytest.raises(UserError, match="not offered"):
            public.offered_base(other)


def test_mcp_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = AppConfig(mcp_server=True, adapters_dir=tmp_path / "adapters", output_dir=tmp_path / "pictures")
    with pytest.raises(UserError, match=r"svft-diffusion\[mcp\]"):
        launch(small_page(), config, wait=False)


def test_mcp_of_a_version_that_cannot_serve_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = ModuleType("mcp")
    empty.__spec__ = ModuleSpec("mcp", None)
    monkeypatch.setitem(sys.modules, "mcp", empty)
    monkeypatch.delitem(sys.modules, "gradio.mcp", raising=False)
    config = AppConfig(
        mcp_server=True, server_port=free_port(), adapters_dir=tmp_path / "adapters", output_dir=tmp_path / "pictures"
    )
    with pytest.raises(UserError, match=r"the MCP server did not start .*svft-diffusion\[mcp\]"):
        launch(small_page(), config, wait=False)
