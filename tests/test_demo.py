"""The page: what draws behind it, its server as anybody may speak to it, and a real browser."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import ROOT, fit

from pipeline.checkpoint import write
from pipeline.cli import main
from pipeline.codec import Columns, Pixels
from pipeline.conditioning import Classes, Masked
from pipeline.denoisers import EDM
from pipeline.doors import demo
from pipeline.errors import UserError
from pipeline.networks import MLP, UNet
from pipeline.samplers import DDIM, Heun
from pipeline.schedules import VP

PROMPT = "a small red circle at the top left"
GOOD = (
    PROMPT,
    "",
    demo.OWN,
    2,
    2.0,
    0,
    2,
)  # prompt, negative, sampler, steps, scale, seed, number
LIMITS = ["--micro-batch", "4", "--most", "5", "--most-steps", "64", "--device", "cpu"]
PIXELS = Pixels(3, 32, 32)
BAD = {
    "prompt": [
        ("", "empty"),
        (" \n", "empty"),
        ("a" * 1001, "1000 char"),
        (None, "text"),
        (3, "text"),
    ],
    "negative": [
        ("a" * 1001, "1000 characters"),
        (None, "text"),
        ({"path": "/etc/passwd"}, "text"),
    ],
    "sampler": [(one, "one of as started") for one in ("mine", None, ["ddim"], {}, "../ddim")],
    "steps": [(one, "from 1 to 64") for one in (0, 65, 2.5, -1, None, "2", True, [2])],
    "scale": [(one, "from 0 to 20") for one in (-0.1, 20.5, None, float("nan"), float("inf"))],
    "seed": [(one, "from 0 to 4294967295") for one in (-1, 2**32, 0.5, 10**400)],
    "number": [(one, "from 1 to 5") for one in (0, 6, 1e9, float("nan"), "all")],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("demo") / "run")


def painter_of(run: Path, *more: str) -> demo.Painter:
    parser = ArgumentParser()
    demo.add_arguments(parser)
    args, options = parser.parse_known_args(["--checkpoint", str(run), *LIMITS, *more])
    return demo.Painter(args, options, "cpu", "python -m pipeline demo")


def asked(painter: demo.Painter, *request: Any) -> list[tuple[list[Any], str]]:
    """All that a request is answered; the files are opened."""
    return [
        (
            [
                Image.open(io.BytesIO(Path(one[0]).read_bytes()))
                if isinstance(one, tuple)
                else one
                for one in shown
            ],
            told,
        )
        for shown, told in painter.answer(*request)
    ]


def generated(run: Path, out: Path, *args: str) -> list[bytes]:
    line = ["generate", PROMPT, "--checkpoint", str(run), "--out", str(out), "--micro-batch", "4"]
    assert main([*line, "--device", "cpu", *args]) == 0
    return [Image.open(file).tobytes() for file in sorted(out.glob("0*.png"))]


@pytest.mark.parametrize("sampler", [demo.OWN, *demo.SAMPLERS])
def test_the_pictures_are_those_of_generate(run: Path, tmp_path: Path, sampler: str) -> None:
    painter = painter_of(run)
    file = str(ROOT / f"conf/sampler/{sampler}.yaml")
    own = [] if sampler == demo.OWN else ["--sampler", file]
    how = ["--number", "5", "--seed", "7", "--steps", "3", "--scale", "3.5"]
    how += ["--guidance.negative", "a blue square"]
    drawn, told = asked(painter, PROMPT, "a blue square", sampler, 3, 3.5, 7, 5)[-1]
    assert "step 6 of 6" in told  # two micro-batches
    assert [one.tobytes() for one in drawn] == generated(run, tmp_path / "out", *own, *how)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    for k, one in enumerate(drawn):
        settings = json.loads(one.text["Settings"])
        assert (settings["prompt"], settings["seed"]) == (PROMPT, 7 + k)
        for name in ("sampler", "guidance", "micro_batch", "shape", "checkpoint"):
            assert settings[name] == manifest[name]


def test_one_request_leaves_nothing_for_the_next(run: Path) -> None:
    painter = painter_of(run)
    before = asked(painter, *GOOD)[-1][0]
    asked(painter, "a blue square", "a red circle", "ddim", 5, 7.0, 3, 1)
    assert [one.tobytes() for one in asked(painter, *GOOD)[-1][0]] == [
        one.tobytes() for one in before
    ]
    assert not painter.generator.denoiser._forward_hooks


def test_what_forms_is_the_estimate(run: Path) -> None:
    """D of the first noise after the first step, and at the end what is drawn."""
    painter = painter_of(run, "--scale", "1")
    shown = asked(painter, PROMPT, "", "ddim", 6, 1.0, 0, 2)
    told = " ".join(told for _, told in shown)
    assert re.findall(r"step (\d) of 6", told) == list("01234566")
    own = painter.generator
    seen: list[torch.Tensor] = []
    hook = own.denoiser.register_forward_hook(lambda module, given, d: seen.append(d.clone()))
    list(own([PROMPT] * 2, [0, 1], 4))
    hook.remove()
    first = own.codec.decode(seen[0])[:2].permute(0, 2, 3, 1).numpy()
    assert [one.tobytes() for one in shown[1][0]] == [one.tobytes() for one in first]
    last, files = shown[-2][0], shown[-1][0]
    assert [one.tobytes() for one in last] == [one.tobytes() for one in files]


def test_who_leaves_ends_the_drawing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter, steps = painter_of(run), []
    step = DDIM.step
    counted = lambda *given: steps.append(0) or time.sleep(0.02) or step(*given)  # noqa: E731
    monkeypatch.setattr(DDIM, "step", counted)
    answers = painter.answer(PROMPT, "", "ddim", 64, 1.0, 0, 1)
    next(answers), next(answers)
    answers.close()  # type: ignore[attr-defined]
    painter.one.submit(int).result()  # what is behind it comes to its turn
    assert 8 <= len(steps) < 20


@pytest.mark.parametrize("name", BAD)
def test_nothing_is_drawn_outside_of_the_limits(run: Path, name: str) -> None:
    painter, place = painter_of(run), [*BAD].index(name)
    painter.check(*GOOD)
    for value, sentence in BAD[name]:
        with pytest.raises(UserError, match=sentence):
            painter.check(*GOOD[:place], value, *GOOD[place + 1 :])


def test_what_the_page_cannot_begin_with_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="steps is 65; it must be a whole number from 1 to 64"):
        painter_of(run, "--steps", "65")
    for network, codec, u in (
        (MLP(2, 1, width=16, depth=1), Columns(2), Classes(["up"])),
        (UNet(3, widths=(16,), blocks=1), PIXELS, None),
        (UNet(3, widths=(16,), blocks=1, planes=4), PIXELS, Masked()),
    ):
        write(tmp_path / "m.ckpt", EDM(network, VP()), codec, u, Heun(3))
        with pytest.raises(UserError, match="pictures drawn from prompts alone, and .*m.ckpt"):
            painter_of(tmp_path / "m.ckpt")
    assert main(["demo", "--most", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_guidance_without_a_negative_prompt_takes_none(run: Path) -> None:
    painter = painter_of(run, "--guidance", str(ROOT / "conf/guidance/composed.yaml"))
    with pytest.raises(UserError, match="takes no negative prompt"):
        painter.check(PROMPT, "a blue square", *GOOD[2:])
    assert len(asked(painter, *GOOD)[-1][0]) == 2


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")  # it is put back
    assert main(["demo"]) == 2
    said = "pip install gradio"
    assert capsys.readouterr().err.splitlines() == [
        f"error: The page is made with Gradio: {said}."
    ]


def test_help_loads_nothing() -> None:
    code = "import sys, atexit; from pipeline.cli import main; "
    code += "atexit.register(lambda: print({'torch', 'gradio'} & {*sys.modules})); "
    told = subprocess.run(
        [sys.executable, "-c", code + "main(['demo', '--help'])"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert told.stdout.splitlines()[-1] == "set()" and "--most-steps" in told.stdout


# the server, as a process of its own, that writes down where it connects to

WATCH = """
import sys
def look(event, given):
    if event == "socket.connect" and isinstance(given[1], tuple) or event == "socket.getaddrinfo":
        print(given[1][0] if event == "socket.connect" else given[0], file=log, flush=True)
log = open({log!r}, "w")
print("watched", file=log, flush=True)
sys.addaudithook(look)
"""


class Server:
    def __init__(self, run: Path, folder: Path) -> None:
        self.log, errors = folder / "log", (folder / "errors").open("w")
        (folder / "sitecustomize.py").write_text(WATCH.format(log=str(self.log)))
        line = [sys.executable, "-m", "pipeline", "demo", "--checkpoint", str(run), *LIMITS]
        self.process = subprocess.Popen(
            [*line, "--port", "0"],
            cwd=ROOT,
            env=os.environ
            | dict.fromkeys(("PYTHONPATH", "TMPDIR", "XDG_CACHE_HOME"), str(folder)),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        said = self.process.stdout.readline()  # type: ignore[union-attr]
        assert (found := re.search(r"http://127\.0\.0\.1:(\d+)/", said)), (
            folder / "errors"
        ).read_text()
        self.url, self.port = found[0], int(found[1])

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """A request as it stands: no client puts its path in order."""
        speaking = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        text = None if body is None else json.dumps(body)
        speaking.request(method, path, text, {"Content-Type": "application/json"})
        answer = speaking.getresponse()
        return answer.status, answer.read()

    def begin(self, *request: Any) -> str:
        told = self.ask("POST", "/gradio_api/call/draw", {"data": request})[1]
        return f"/gradio_api/call/draw/{json.loads(told)['event_id']}"

    def drawn(self, *request: Any) -> list[bytes] | str:
        """The pixels of the files that are drawn, or the sentence that says why none are."""
        last = self.ask("GET", self.begin(*request))[1].decode().strip().split("\n\n")[-1]
        told = json.loads(last.partition("data: ")[2])
        if "event: complete" not in last:
            return told["error"]
        urls = [one["image"]["url"].removeprefix(self.url) for one in told[0]]
        return [pixels(self.ask("GET", f"/{url}")[1]) for url in urls]


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    made = Server(run, tmp_path_factory.mktemp("server"))
    yield made
    made.process.terminate()
    assert made.process.wait(30) == 128 + signal.SIGTERM


def test_the_server_draws_and_speaks_to_nobody_else(server: Server, run: Path) -> None:
    expected = [one.tobytes() for one in asked(painter_of(run), *GOOD)[-1][0]]
    assert server.drawn(*GOOD) == expected
    places = server.log.read_text().split()
    assert places[0] == "watched" and {*places[1:]} <= {"127.0.0.1", "localhost", "None"}


def test_its_client_sees_the_pictures_form(server: Server, tmp_path: Path) -> None:
    client = pytest.importorskip("gradio_client").Client(
        server.url, verbose=False, download_files=str(tmp_path)
    )
    job = client.submit(PROMPT, "", "ddim", 8, 2.0, 0, 1, api_name="/draw")
    shown = [*job]
    assert len({pixels(Path(one[0]["image"]).read_bytes()) for one, _ in shown if one}) > 2
    assert "step 8 of 8" in shown[-1][1]
    with pytest.raises(Exception, match="number is 6; it must be a whole number from 1 to 5"):
        client.predict(*GOOD[:-1], 6, api_name="/draw")


@pytest.mark.parametrize("name", BAD)
def test_a_request_outside_of_the_limits_is_answered_by_a_sentence(
    server: Server, name: str
) -> None:
    place = [*BAD].index(name)
    for value, sentence in BAD[name]:
        told = server.drawn(*GOOD[:place], value, *GOOD[place + 1 :])
        assert isinstance(told, str) and sentence in told


def test_what_it_says_is_no_html(server: Server) -> None:
    assert "&lt;b&gt;" in server.drawn(*GOOD[:3], "<b>", *GOOD[4:])


def test_no_file_of_the_machine_is_sent(server: Server, run: Path) -> None:
    secret = run / "config.yaml"
    up = "../" * 12
    tricks = [f"file={secret}", f"file={up}{secret}", f"file=/{up}{secret}", f"file/{secret}"]
    tricks += ["file=/etc/passwd", f"file=/{up}etc/passwd", "file=%2fetc%2fpasswd"]
    tricks += ["file=/proc/self/environ", "file=file:///etc/passwd", "file=/%2e%2e/etc/passwd"]
    served = json.dumps(server.ask("GET", server.begin(*GOOD))[1].decode())
    folder = re.search(r"file=(/.+?)/[0-9a-f]{64}/", served)[1]  # type: ignore[index]
    tricks += [
        f"file={folder}/{up}etc/passwd",
        f"file={folder}/..%2f..%2f..%2f..%2f..%2fetc/passwd",
    ]
    paths = [f"{before}/{one}" for one in tricks for before in ("/gradio_api", "")]
    for before in ("static", "assets", "gradio_api/static"):
        paths += [f"/{before}/{up}etc/passwd", f"/{before}/{up.replace('/', '%2f')}etc/passwd"]
        paths += [f"/{before}//etc/passwd", f"/{before}/{up.replace('.', '%2e')}etc/passwd"]
    for path in paths:
        status, body = server.ask("GET", path)
        assert status in (403, 404) and b"root:" not in body, path


def test_what_the_page_does_not_need_is_closed(server: Server) -> None:
    """To be sent files, to fetch an address for somebody, to draw past the queue."""
    for path in ("upload", "run/draw", "api/draw", "process_recording", "vibe-edit"):
        assert server.ask("POST", f"/gradio_api/{path}", {"data": GOOD})[0] == 403
    for path in ("proxy=http://127.0.0.1/", f"file={server.url}config", "run-history/records"):
        assert server.ask("GET", f"/gradio_api/{path}")[0] == 403
    assert {server.ask("GET", path)[0] for path in ("/monitoring", "/docs", "/login")} == {403}
    assert {server.ask("GET", path)[0] for path in ("/", "/config", "/theme.css")} == {200}


@pytest.mark.parametrize("data", [[], GOOD[:3], [*GOOD, 1], "7 signs", None, {}])
def test_how_many_values_it_takes_is_said(data: Any, server: Server) -> None:
    code, said = server.ask("POST", "/gradio_api/call/draw", {"data": data})[:2]
    assert code == 422 and "7 values: prompt, negative prompt, sampler, steps" in str(said)


def test_what_is_too_long_or_of_another_site_is_refused(server: Server) -> None:
    def ask(body: Any, **headers: str) -> tuple[int, bytes]:
        speaking = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        headers |= {"Content-Type": "application/json"}
        try:
            speaking.request("POST", "/gradio_api/call/draw", body, headers)
        except OSError:  # the answer comes before all of it is sent
            pass
        answer = speaking.getresponse()
        return answer.status, answer.read()

    request = json.dumps({"data": GOOD})
    long = json.dumps({"data": ["a" * 70_000, *GOOD[1:]]})
    assert ask(long)[0] == 413
    assert ask(iter([long[:60_000].encode(), long[60_000:].encode()]))[0] == 413  # in chunks
    assert ask(request, Origin="http://elsewhere.org")[0] == 403
    assert ask(request, Origin=f"http://127.0.0.1:{server.port}")[0] == 200
    speaking = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    speaking.request("GET", "/config", headers={"X-Forwarded-Host": "elsewhere.org"})
    assert b"elsewhere" not in speaking.getresponse().read()
    for path in ("/gradio_api/call/other", f"/assets/{'a' * 5000}"):
        assert server.ask("GET", path)[0] == 403


def test_fifty_requests_wait_for_each_other(server: Server) -> None:
    """All are answered, each as it would be alone."""
    kinds = [(PROMPT, "", "ddim", 2, 2.0, 1, 1), ("a blue square", "", "heun", 3, 4.0, 2, 2)]
    kinds += [(PROMPT, "a red circle", "unipc", 4, 3.0, 0, 1), (*GOOD[:-1], 9)]
    alone, answers = [server.drawn(*kind) for kind in kinds], [None] * 50

    def ask(k: int) -> None:
        answers[k] = server.drawn(*kinds[k % 4])  # type: ignore[call-overload]

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert answers == [alone[k % 4] for k in range(50)]


def test_the_queue_is_of_a_length(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes when it is full is told so, and those that wait are drawn."""
    client = pytest.importorskip("fastapi.testclient")
    painter, begun, go = painter_of(run), threading.Event(), threading.Event()

    def draw(*how: object) -> Iterator[tuple[list[Any], str]]:
        begun.set()
        assert go.wait(60)
        yield [], ""

    monkeypatch.setattr(demo, "WAITING", 2)
    monkeypatch.setattr(painter, "draw", draw)
    told = []
    with client.TestClient(demo.page(painter)) as speaking:
        for _ in range(4):
            told.append(speaking.post("/gradio_api/call/draw", json={"data": GOOD}))
            assert begun.wait(60)  # the first is on its way when the others come
        assert [one.status_code for one in told] == [200, 200, 200, 503]
        assert "full" in told[3].text
        go.set()
        for one in told[:3]:
            path = f"/gradio_api/call/draw/{one.json()['event_id']}"
            assert "event: complete" in speaking.get(path).text


def test_a_port_that_is_taken_is_said(
    server: Server, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
        monkeypatch.setenv(name, "")  # they are put back
    taken = ["--port", str(server.port), "--checkpoint", str(run)]
    assert main(["demo", *taken, *LIMITS]) == 2
    assert f"--port {server.port} cannot be listened at" in capsys.readouterr().err


@pytest.mark.slow
def test_it_stops_in_the_middle_of_a_drawing(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    server = Server(run, tmp_path)
    path = server.begin(PROMPT, "", "ddpm", 64, 2.0, 0, 5)
    for one in (path, "/gradio_api/heartbeat/somebody"):  # who waits, and whose page is open
        speaking = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        speaking.request("GET", one)
        assert speaking.getresponse().read(1)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 128 + signal.SIGINT
    assert (tmp_path / "errors").read_text().strip() == "Stopped by SIGINT."
    assert not [*tmp_path.glob("tmp*")]


# a person's browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    if (file := next(filter(None, map(shutil.which, names)), None)) is None:
        pytest.skip(f"there is none of {', '.join(names)}")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=file, args=["--no-sandbox"])
        yield made
        made.close()


def visit(browser: Any, server: Server, prompt: str, number: int = 1) -> Any:
    page = browser.new_page()
    page.foreign = []
    page.on("request", lambda one: one.url.startswith(server.url) or page.foreign.append(one.url))
    page.goto(server.url)
    page.get_by_label("prompt", exact=True).fill(prompt)
    page.get_by_label("number input for number").fill(str(number))
    page.get_by_role("button", name="draw").click()
    return page


def seen(page: Any, server: Server, number: int) -> list[bytes]:
    """The pixels of the pictures, once they are drawn."""
    page.get_by_text(f"seed {number - 1}", exact=True).first.wait_for()
    pictures = page.locator(".grid-container img").all()
    assert page.foreign == [] and len(pictures) == number
    return [
        pixels(server.ask("GET", one.get_attribute("src").removeprefix(server.url[:-1]))[1])
        for one in pictures
    ]


def test_a_browser_shows_what_is_drawn(browser: Any, server: Server) -> None:
    page = visit(browser, server, PROMPT, 2)
    assert seen(page, server, 2) == server.drawn(*GOOD)
    assert page.locator("progress").get_attribute("value") == "2"
    assert page.locator("img").first.evaluate("one => one.naturalWidth") == 32
    page.get_by_label("sampler").click()
    page.get_by_role("option", name="unipc").click()
    assert page.get_by_label("number input for steps").input_value() == "16"  # its own


def test_a_browser_shows_what_is_wrong(browser: Any, server: Server) -> None:
    page = visit(browser, server, "  ")
    page.get_by_text("The prompt is empty; say what to draw.").wait_for()
    assert page.locator(".grid-container img").count() == 0


def test_two_people_at_once_get_theirs(browser: Any, server: Server) -> None:
    prompts = (PROMPT, "a large blue square at the bottom right")
    pages = [visit(browser, server, prompt) for prompt in prompts]
    drawn = [seen(page, server, 1) for page in pages]
    assert drawn == [server.drawn(prompt, *GOOD[1:-1], 1) for prompt in prompts]
    assert drawn[0] != drawn[1]
