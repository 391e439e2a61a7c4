"""`demo`: a page on which a model draws, for a browser.

What is asked for comes by HTTP, which anybody can speak without the page: the limits are checked
where it arrives. One drawing is made at a time; the others wait in Gradio's queue.
"""

import argparse
import copy
import html
import json
import logging
import os
import re
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pipeline.doors.shared import add_model, add_number, choose, open_model
from pipeline.errors import UserError

SUMMARY = "try a model in a browser"
FREE = ("sampler.", "guidance.")  # how further options begin
DESCRIPTION = """\
Open a page on which a trained model draws pictures from prompts, seen as they form. What it begins
with is what the run, or the options here, say. `generate` draws the same pictures with the same
settings, --micro-batch among them."""
EPILOG = "example: python -m pipeline demo --most 4 --micro-batch 4"

SAMPLERS = "adaptive ddim ddpm dpm_solver dpm_solver_sde heun heun_churn unipc".split()
OWN = "as started"  # the sampler of the run, or of --sampler
LONGEST, GREATEST, SEEDS = 1000, 20, 2**32  # characters of a prompt; scale; number of seeds
WAITING = 200  # requests in the queue; who comes when it is full is told so
LOOKS = 8  # at pictures as they form
# what the page needs of Gradio, which would also take files, fetch addresses and skip the queue
OPEN = re.compile(
    r"/|/(config|theme\.css|manifest\.json|favicon\.ico|(assets|static)/.*)"
    r"|/gradio_api/(info|startup-events|heartbeat/\w+|queue/(join|data)|call/draw(/\w+)?|cancel"
    r"|file=/.*)"
)
ASKS = ("/gradio_api/queue/join", "/gradio_api/call/draw")
LARGE = 65_536  # bytes of a request; a drawing is asked for by a few thousand


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_number(parser, "--most", "N", 16, "the most pictures of a drawing")
    add_number(parser, "--most-steps", "N", 250, "the most steps of a drawing")
    what = "the address to listen at (default: 127.0.0.1, which this machine alone can reach)"
    parser.add_argument("--host", default="127.0.0.1", help=what)
    add_number(parser, "--port", "PORT", 7860, "the port to listen at, 0 for any that is free")
    add_model(parser)


def run(args: argparse.Namespace, options: list[str], line: str) -> int:
    """Listen until stopped."""
    if min(args.most, args.most_steps, args.micro_batch) < 1:
        raise UserError("--most, --most-steps and --micro-batch must be at least 1.")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"
    try:
        import_module("gradio")
    except ImportError as error:
        raise UserError("The page is made with Gradio: pip install gradio.") from error
    from pipeline.distributed import join

    with (
        join(args.device) as device,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        # the only folder that files are sent from
        os.environ |= dict.fromkeys(("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"), folder)
        painter = Painter(args, options, device, line)
        uvicorn, how = import_module("uvicorn"), {"log_level": "warning"}
        config = uvicorn.Config(page(painter), timeout_graceful_shutdown=1, **how)
        try:
            listening = socket.create_server((args.host, args.port))
        except (OSError, OverflowError) as error:
            said = f"--host {args.host} --port {args.port} cannot be listened at: {error}"
            raise UserError(f"{said}; name another.") from error
        print("The page is at http://{}:{}/".format(*listening.getsockname()), flush=True)
        server = uvicorn.Server(config)
        stop = server.handle_exit

        def stopped(signum: int, frame: object) -> None:
            painter.closed = True  # who waits is told so, after the step that it is at
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of who is cut off
            stop(signum, frame)

        server.handle_exit = stopped
        try:
            server.run([listening])
        finally:
            painter.closed = True
            painter.one.shutdown()  # after the step that it is at
    return 0


class Painter:
    """Draws what is asked for, if it is within the limits."""

    def __init__(
        self, args: argparse.Namespace, options: Sequence[str], device: str, line: str
    ) -> None:
        from pipeline.building import Config, Text, make
        from pipeline.conditioning import Picture
        from pipeline.guidance import ClassifierFree
        from pipeline.samplers import Sampler

        checkpoint, own = open_model(args.checkpoint, device, args.trust, args.ema)
        if not own.codec.pictures or isinstance(own.conditioning, Picture | None):
            raise UserError(
                f"The page is for pictures drawn from prompts alone, and {checkpoint.path} is no "
                "model of such; use generate."
            )
        how = (args.sampler, args.guidance, args.steps, args.scale, options)
        chosen = choose(own, checkpoint, *how)
        self.settings = {"checkpoint": str(checkpoint.path), "ema": args.ema, **chosen}
        self.settings |= {"micro_batch": args.micro_batch, "device": device, "command": line}
        self.generator, self.micro_batch, self.samplers = own, args.micro_batch, {OWN: own.sampler}
        self.guidance: Any = own.guidance or ClassifierFree()
        self.negates = isinstance(self.guidance, ClassifierFree)
        for name in SAMPLERS:
            config = Config()
            config.set("sampler", Text(f"conf/sampler/{name}.yaml"))
            self.samplers[name] = make(config.resolve("sampler", Sampler))
        # of each number its name, its limits, its step, and what it begins with
        self.numbers = (
            ("steps", 1, args.most_steps, 1, own.sampler.steps),
            ("scale", 0, GREATEST, 0.1, self.guidance.scale),
            ("seed", 0, SEEDS - 1, 1, args.seed),
            ("number", 1, args.most, 1, min(4, args.most)),
        )
        self.prompt, self.negative = next(iter(checkpoint.prompts), ""), self.guidance.negative
        self.check("any", self.negative or "", OWN, *(number[-1] for number in self.numbers))
        self.one, self.closed = ThreadPoolExecutor(1), False

    def check(self, prompt: Any, negative: Any, sampler: Any, *numbers: Any) -> None:
        """Raise `UserError` for what is outside of the limits."""
        for name, text in (("prompt", prompt), ("negative prompt", negative)):
            if not isinstance(text, str) or len(text) > LONGEST:
                raise UserError(f"The {name} must be text of at most {LONGEST} characters.")
        if not prompt.strip():
            raise UserError("The prompt is empty; say what to draw.")
        if negative and not self.negates:
            raise UserError("The model is guided in a way that takes no negative prompt.")
        if sampler not in list(self.samplers):
            raise UserError(f"The sampler must be one of {', '.join(self.samplers)}.")
        for value, (name, least, most, step, _) in zip(numbers, self.numbers, strict=True):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= most or (step == 1 and value % 1):
                kind = "whole number" if step == 1 else "number"
                said = f"{name} is {str(value)[:20]}; it must be a {kind}"
                raise UserError(f"{said} from {least} to {most}.")

    def answer(
        self,
        prompt: str,
        negative: str,
        sampler: str,
        steps: float,
        scale: float,
        seed: float,
        number: float,
    ) -> Iterator[tuple[list[Any], str]]:
        """The pictures as they form and then their files, and beside them how far they are."""
        try:
            self.check(prompt, negative, sampler, steps, scale, seed, number)
            how = self.settled(negative, sampler, int(steps), float(scale))
            yield from self.draw(prompt, int(seed), int(number), *how)
        except UserError as error:
            said = html.escape(str(error), quote=False)
            raise import_module("gradio").Error(said, print_exception=False) from error

    def settled(
        self, negative: str, sampler: str, steps: int, scale: float
    ) -> tuple[Any, dict[str, Any]]:
        """What draws so, and the settings in words."""
        from pipeline.building import brief, replace

        own: Any = copy.copy(self.generator)
        own.sampler = replace(self.samplers[sampler], steps=steps)
        also = {"negative": negative or None} if self.negates else {}
        own.guidance = replace(self.guidance, scale=scale, **also)
        about = {"sampler": brief(own.sampler), "guidance": brief(own.guidance)}
        return own, self.settings | about

    def draw(
        self, prompt: str, seed: int, number: int, own: Any, settings: dict[str, Any]
    ) -> Iterator[tuple[list[Any], str]]:
        """Draw in the one thread that does, until nobody waits for it. What forms is D, as the
        sampler has just seen it.
        """
        told, left, seen, step = SimpleQueue[Any](), threading.Event(), deque[Any](maxlen=1), 0
        total = own.rounds(number, self.micro_batch) * own.sampler.steps
        about: list[Any] = [{"prompt": prompt, "seed": seed + k} for k in range(number)]
        done, guided = list[Any](), own.guided()
        own.guided = lambda: guided

        def show(rows: Any) -> None:
            forming = [row.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy() for row in rows]
            told.put((done + forming, bar(step, total)))

        def watch(state: object) -> None:
            nonlocal step
            step += 1
            if left.is_set() or self.closed:
                raise UserError("Nobody waits for it any more.")
            if seen and step % max(own.sampler.steps // LOOKS, 1) == 0:
                show(own.codec.decode(seen.pop())[: number - len(done)])

        def work(folder: Path) -> None:
            show([])
            look = guided.register_forward_hook(lambda module, given, d: seen.append(d))
            try:
                seeds = [one["seed"] for one in about]
                for rows in own([prompt] * number, seeds, self.micro_batch, watch):
                    own.codec.write(rows, len(done), folder, about, settings)
                    new = about[len(done) : len(done) + len(rows)]
                    done.extend((f"{folder}/{one['file']}", f"seed {one['seed']}") for one in new)
                    show([])
            finally:
                look.remove()

        with tempfile.TemporaryDirectory() as folder:
            drawing = self.one.submit(work, Path(folder))
            drawing.add_done_callback(lambda _: told.put(None))
            try:
                yield from iter(told.get, None)
                drawing.result()
            finally:
                left.set()


def bar(step: int, total: int) -> str:
    how = f'value="{step}" max="{total}" style="width: 100%"'
    return f"<progress {how}></progress>step {step} of {total}"


def page(painter: Painter) -> Any:
    """What serves the page, and the drawings, by HTTP (ASGI)."""
    gradio, fastapi = import_module("gradio"), import_module("fastapi")
    with gradio.Blocks(title="Pictures from prompts", delete_cache=(600, 3600)) as blocks:
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(painter.prompt, label="prompt", max_length=LONGEST)
                how: dict[str, Any] = {"label": "negative prompt", "visible": painter.negates}
                negative = gradio.Textbox(painter.negative or "", max_length=LONGEST, **how)
                sampler = gradio.Dropdown(list(painter.samplers), value=OWN, label="sampler")
                numbers: list[Any] = []
                for name, least, most, step, value in painter.numbers:
                    kind = gradio.Number if name == "seed" else gradio.Slider
                    how = {"minimum": least, "maximum": most, "step": step, "label": name}
                    numbers.append(kind(value=value, **how))
                button = gradio.Button("draw", variant="primary")
            with gradio.Column():
                how = {"format": "png", "interactive": False, "buttons": ["download"]}
                pictures = gradio.Gallery(label="pictures", show_label=False, **how)
                told = gradio.HTML()
        asked = [prompt, negative, sampler, *numbers]
        how = {"api_name": "draw", "preprocess": False, "show_progress": "minimal"}
        gradio.on([button.click, prompt.submit], painter.answer, asked, [pictures, told], **how)
        most = painter.numbers[0][2]
        known = json.dumps({name: min(one.steps, most) for name, one in painter.samplers.items()})
        sampler.input(None, sampler, numbers[0], js=f"(name) => ({known})[name]")
    blocks.queue(default_concurrency_limit=1, max_size=WAITING)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    how = {"theme": gradio.themes.Default(**fonts), "css": "img {image-rendering: pixelated}"}
    how |= {"footer_links": [], "run_history": False, "mcp_server": False, "ssr_mode": False}
    app = fastapi.FastAPI(openapi_url=None)
    gradio.mount_gradio_app(app, blocks, "/", show_error=False, **how)

    async def door(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await app(scope, receive, send)
        headers = dict(scope["headers"])
        asked_by = headers.get(b"origin", b"").partition(b"://")[2]  # the page that asks
        is_ours = asked_by in (b"", headers.get(b"host"))
        path = scope["path"]
        if not is_ours or len(path) > LONGEST or not OPEN.fullmatch(path):
            return await fastapi.Response(status_code=403)(scope, receive, send)
        body = bytearray()
        while scope.get("method") == "POST":  # read whole, before anything is made of it
            told = await receive()
            body += told.get("body", b"")
            if len(body) > LARGE:
                return await fastapi.Response(status_code=413)(scope, receive, send)
            if not told.get("more_body"):
                break
        if path in ASKS and fields(body) != len(asked):
            names = ", ".join(str(one.label) for one in asked)
            said = f"data must be a list of {len(asked)} values: {names}."
            return await fastapi.Response(said, 422)(scope, receive, send)
        whole = iter([{"type": "http.request", "body": bytes(body)}])

        async def received() -> Any:
            return next(whole, None) or await receive()

        # what a proxy may say of itself is nobody else's to say
        own = [pair for pair in scope["headers"] if not pair[0].startswith(b"x-forwarded")]
        await app({**scope, "headers": own}, received, send)

    return door


def fields(body: bytes | bytearray) -> int | None:
    """How many values a request has for a drawing; `None` where it is none."""
    try:
        data = json.loads(body)["data"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return len(data) if isinstance(data, list) else None
