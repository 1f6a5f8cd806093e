"""Runs ToMe in a real AUTOMATIC1111, reForge or Forge and prints a table of what was right.

    python tests/hosts/a1111.py DIR [--markdown FILE] [--size PIXELS] [--only REGEX] [-- the host's own arguments]

DIR is a checkout that starts by itself, with at least one checkpoint. The host runs twice, with nobody at its page:
first without this extension, for the pictures to compare with, then with it. For the second run this repository is
linked into DIR/extensions, and beside it a small extension that counts hooks and makes the U-Net fail when asked;
both are taken out again. On a CPU give `-- --use-cpu all --no-half --skip-torch-cuda-test`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from installer import link

HELPER = '''
import sys

from modules import scripts


class Helper(scripts.Script):
    """Arguments: [fail, couple]. Tells in the picture's text how many hooks are on the model before a generation,
    whether it is a transformer, and whether a function of the host's is still ToMe's.

    couple: replaces each attn2.forward by one that goes by the number of tokens, and tells those that it cannot place.
    """

    def title(self):
        return "ToMe host test"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        import gradio as gr

        return [gr.Checkbox(False, label="fail"), gr.Checkbox(False, label="couple")]

    def before_process(self, p, *args):
        unet = self._unet(p)
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
        p.extra_generation_params["Hooks before"] = hooks  # the API tells no comments
        p.extra_generation_params["Transformer"] = not hasattr(unet, "middle_block")
        functions = [getattr(module, "attention_function", None) for module in list(sys.modules.values())]
        p.extra_generation_params["Swapped before"] = any(type(one).__name__ == "Swapped" for one in functions)

    def process_before_every_sampling(self, p, fail=False, couple=False, *args, **kwargs):
        unet = self._unet(p)
        if couple:
            self._couple(p, unet)
        if not fail:
            return
        calls = []

        def stop(*_):
            calls.append(1)
            if len(calls) == 2:
                handle.remove()
                raise RuntimeError("the U-Net fails, as the test asked")

        blocks = (getattr(unet, name, None) for name in ("middle_block", "single_blocks", "transformer_blocks"))
        handle = next(filter(None, blocks))[0].register_forward_pre_hook(stop)

    def _couple(self, p, unet):
        height, width = p.height // 8, p.width // 8
        levels = {-(-height // n) * -(-width // n) for n in (1, 2, 4, 8)}
        self.attentions = [m.attn2 for m in unet.modules() if hasattr(m, "attn1") and hasattr(m, "attn2")]
        for attn2 in self.attentions:

            def forward(x, *args, attn2=attn2, **kwargs):
                if x.shape[1] not in levels:
                    p.extra_generation_params["Not placed"] = x.shape[1]
                return type(attn2).forward(attn2, x, *args, **kwargs)

            attn2.forward = forward

    def post_sample(self, p, ps, *args):
        for attn2 in getattr(self, "attentions", ()):
            vars(attn2).pop("forward", None)

    def _unet(self, p):
        objects = getattr(p.sd_model, "forge_objects", None)
        return (objects.unet.model if objects is not None else p.sd_model.model).diffusion_model
'''
ASKED = "the U-Net fails, as the test asked"
# What checks look for in ToMe's lines in the log; tests/a1111/test_host_list.py holds them to what the code says.
FEW = "fewer than min tokens"
NO_STEPS = "leave out all 4 steps"
NO_LEVEL = "are no level of"
NO_GRID = "a layer whose tokens are not those of its grid"
NO_WEIGHTS = "proportional attention is off"
NO_LSE = "gives no log-sum-exp"
NOT_KEPT = "own token has no effect"
NOT_EXACT = "exact every has no effect"
REPLACED_SELF = "ToMe skips a self-attention that another node or extension replaces"
REPLACED_CROSS = "ToMe skips a cross-attention that another node or extension replaces"
BUILT_IN = "built-in token merging"
METHODS = ("sample", "merge", "merge_queries", "merge_keys", "downsample", "prune")
ON = {"ratio": 0.5, "min_tokens": 0}
BASE = {
    "prompt": "a lighthouse on a rock", "negative_prompt": "blurry", "steps": 4, "width": 256, "height": 256,
    "seed": 1, "sampler_name": "Euler", "scheduler": "Automatic", "cfg_scale": 5,
}  # fmt: skip
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
# Files of ours that a traceback may name.
OURS = ("sd_webui_tome", "a1111_extension/", "comfy_tome/", "shared_tome/")


def own_tracebacks(log: str) -> list[str]:
    """The tracebacks in a host's log that run through this extension, but for those that end as a check asked."""
    parts = re.split(r"Traceback \(most recent call last\)", log)[1:]
    # A traceback ends with its first line that is no indented frame: the error's.
    found = (re.match(r"(?s):?.*?\n\s*[\w.]+(?:Error|Exception|Interrupt)\b[^\n]*", part) for part in parts)
    texts = (match[0] if match else part for match, part in zip(found, parts, strict=True))
    return [text for text in texts if any(name in text for name in OURS) and ASKED not in text.splitlines()[-1]]


class Failed(Exception):
    """A check that did not come out. The text goes into the table."""


class Skipped(Exception):
    """A check that this host or this set-up cannot run."""


class Reply:
    """What the host answered."""

    def __init__(self, status: int, body: dict[str, Any]):
        self.status, self.body = status, body

    @property
    def images(self) -> list[np.ndarray]:
        if self.status != 200:
            raise Failed(f"HTTP {self.status}: {str(self.body.get('detail') or self.body)[:200]}")
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"), dtype=np.int16)
            for image in self.body["images"]
        ]

    @property
    def image(self) -> np.ndarray:
        return self.images[0]

    @property
    def info(self) -> dict[str, Any]:
        return json.loads(self.body["info"])

    @property
    def text(self) -> str:
        return self.info["infotexts"][0]


class Server:
    """The host, running headless."""

    def __init__(self, folder: Path, arguments: list[str], log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        python = next((p for p in (folder / "venv/bin/python", folder / "venv/Scripts/python.exe") if p.exists()), None)
        command = [
            str(python or sys.executable),
            "launch.py",
            "--api",
            "--port",
            str(self.port),
            *arguments,
        ]
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        started = time.monotonic()
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"the host ended with {self.process.returncode}; see {log}")
            # Not a request sooner: one that comes while the host sets up its API makes it fall over.
            if "Startup time" in log.read_text(errors="replace"):
                try:
                    if self.post("txt2img", {**BASE, "steps": 1}).status == 200:
                        break
                except OSError:
                    pass
            if time.monotonic() - started > 600:
                self.stop()
                raise SystemExit(f"the host did not start in 10 minutes; see {log}")
            time.sleep(1)
        # A setting that a request overrides stays overridden after it where config.json does not have it (a fault of
        # the host), so every request says all that any check overrides.
        now = self.call("options").body
        names = ("batch_cond_uncond", "token_merging_ratio", "hypertile_enable_unet")
        self.settings = {name: now[name] for name in names if name in now}
        self.hires = HIRES
        if HIRES["hr_upscaler"] not in [mode["name"] for mode in self.call("latent-upscale-modes").body]:
            self.hires = {**HIRES, "hr_upscaler": "None"}  # Forge Neo has none that works on latents
        if "hr_additional_modules" in (folder / "modules" / "processing.py").read_text(encoding="utf-8"):
            self.hires = {**self.hires, "hr_additional_modules": ["Use same choices"]}  # Forge fails without it

    def call(self, path: str, body: Any = None, method: str | None = None) -> Reply:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/sdapi/v1/{path}", data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return Reply(answer.status, json.loads(answer.read() or b"null"))
        except urllib.error.HTTPError as error:
            return Reply(error.code, json.loads(error.read() or b"{}"))

    def post(self, path: str, body: Any) -> Reply:
        return self.call(path, body, "POST")

    def make(
        self, tome: Any = None, path: str = "txt2img", fail: bool = False, couple: bool = False, **request: Any
    ) -> Reply:
        """A picture. tome: None, the list of arguments, or a dict of names."""
        always = {}
        if tome is not None:
            always["ToMe"] = {"args": [tome] if isinstance(tome, dict) else tome}
        if fail or couple:
            always["ToMe host test"] = {"args": [fail, couple]}
        settings = {**self.settings, **request.pop("override_settings", {})}
        return self.post(path, {**BASE, **request, "override_settings": settings, "alwayson_scripts": always})

    @property
    def said(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Host:
    """What a host does without ToMe. inpaint_apart: how far two equal inpainting requests are, in 1/255; takes_text:
    whether its API takes a picture's text."""

    inpaint_apart: int = 0
    takes_text: bool = True


def png(image: Image.Image) -> str:
    """base64 of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def inpainting(source: Image.Image) -> dict[str, Any]:
    """A request that makes the left half of a picture anew."""
    mask = Image.new("L", source.size)
    mask.paste(255, (0, 0, mask.width // 2, mask.height))
    more = {"denoising_strength": 0.75, "mask": png(mask), "inpainting_fill": 1}
    return {"path": "img2img", "init_images": [png(source)], **more}


def apart(one: np.ndarray, two: np.ndarray) -> int:
    """The largest difference of two pictures, in 1/255."""
    if one.shape != two.shape:
        raise Failed(f"sizes {one.shape} and {two.shape}")
    return int(np.abs(one - two).max())


def mean(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.abs(one - two).mean())


def same(one: np.ndarray, two: np.ndarray, what: str, within: int = 0) -> None:
    distance = apart(one, two)
    if distance > within:
        raise Failed(f"{what}: {distance}/255 apart (mean {mean(one, two):.2f})")


def other(one: np.ndarray, two: np.ndarray, what: str) -> None:
    if apart(one, two) == 0:
        raise Failed(f"{what}: no difference")


class List:
    """The checks. Each method named check_* is one row; its docstring is the row's text, what it returns its detail."""

    def __init__(self, server: Server, before: dict[str, np.ndarray], folder: Path, host: Host):
        self.server, self.before, self.folder, self.host = server, before, folder, host
        self.forge = (folder / "modules_forge").is_dir()
        self.make = server.make
        self.source = Image.fromarray(before["plain"].astype(np.uint8))
        self.transformer = "Transformer: True" in self.make().text

    def _plain(self, what: str) -> None:
        reply = self.make()
        same(reply.image, self.before["plain"], f"the picture without ToMe after {what}")
        hooks = re.search(r"Hooks before: (\d+)", reply.text)
        if not self.forge and (hooks is None or hooks[1] != "0"):
            raise Failed(f"hooks are left after {what}: {hooks and hooks[1]}")
        if "Swapped before: False" not in reply.text:
            raise Failed(f"a function of the host's is ToMe's after {what}")

    def check_off(self) -> str:
        """Off and ratio 0: bit-equal to no extension at all"""
        for tome in (None, [False, 0.9], [True, 0.0], {"ratio": 0.0}):
            same(self.make(tome).image, self.before["plain"], f"with {tome}")
        reply = self.make([True, 0.0], **self.server.hires)
        same(reply.image, self.before["hires"], "hires")
        return "txt2img, hires"

    def check_methods(self) -> str:
        """Each method changes the picture, repeats bit for bit, and is gone after"""
        found = []
        for method in (*METHODS, "multires") if self.transformer else METHODS:
            tome = {**ON, "method": method}
            image = self.make(tome).image
            other(image, self.before["plain"], method)
            same(self.make(tome).image, image, f"{method} again")
            found.append(f"{method} {mean(image, self.before['plain']):.1f}")
        self._plain("merging")
        return "mean difference of 255: " + ", ".join(found)

    def check_exception(self) -> str:
        """An exception in the U-Net leaves nothing behind"""
        reply = self.make({**ON, "method": "merge"}, fail=True)
        if reply.status == 200:
            raise Failed("the U-Net did not fail")
        self._plain("an exception")
        return f"HTTP {reply.status}, then bit-equal"

    def check_interrupt(self) -> str:
        """An interrupt leaves nothing behind"""
        replies: list[Reply] = []
        thread = threading.Thread(target=lambda: replies.append(self.make(ON, steps=60)))
        thread.start()
        for _ in range(200):
            time.sleep(0.1)
            state = self.server.call("progress").body["state"]
            if state["sampling_step"] >= 2 and state["sampling_steps"] == 60:
                break
        self.server.post("interrupt", {})
        thread.join()
        self._plain("an interrupt")
        return f"stopped at step {state['sampling_step']} of 60"

    def check_batch(self) -> str:
        """An image of a batch of four is the same made alone (`sample`: to 1/255)"""
        found = []
        for method in ("sample", "merge"):
            tome = {**ON, "method": method}
            plain, four = self.make(batch_size=4).images[-4:], self.make(tome, batch_size=4).images[-4:]
            distances, without = [], []
            for i in range(4):
                distances.append(apart(four[i], self.make(tome, seed=1 + i).image))
                without.append(apart(plain[i], self.make(seed=1 + i).image))
            found.append(f"{method} {max(distances)}/255")
            if method == "sample" and max(distances) > max(1, *without):
                raise Failed(f"{distances} of 255 apart (without ToMe {without})")
        return ", ".join(found) + f"; without ToMe {max(without)}/255"

    def check_batches(self) -> str:
        """Batches after each other take their own seeds"""
        two = self.make(ON, n_iter=2).images[-2:]
        same(two[1], self.make(ON, seed=2).image, "the second")
        return ""

    def check_prompts(self) -> str:
        """ "a AND b", prompts of different length, batch_cond_uncond off: right and reproducible"""
        long = "a lighthouse, " * 40
        cases = {
            "AND": {"prompt": "a lighthouse AND a rock :0.5"},
            "long": {"prompt": long},
            "long AND": {"prompt": f"{long} AND a rock"},
        }
        worst, flat = 0, []
        for name, request in cases.items():
            plain = self.make(**request).image
            if plain.std() < 3:  # NaN, with random weights
                flat.append(name)
                continue
            image = self.make(ON, **request).image
            other(image, plain, name)
            same(self.make(ON, **request).image, image, f"{name} again")
            if not self.forge:
                split = self.make(ON, **request, override_settings={"batch_cond_uncond": False}).image
                base = self.make(**request, override_settings={"batch_cond_uncond": False}).image
                limit = max(1, apart(base, plain))
                worst = max(worst, apart(split, image))
                same(split, image, f"{name} in split calls", limit)
            pair = self.make(ON, **request, batch_size=2).images[-2:]
            worst = max(worst, apart(pair[0], image))
            same(pair[0], image, f"{name} in a batch of two", 1)
        if len(flat) == len(cases):
            raise Skipped("these prompts' pictures are flat without ToMe too; choose another checkpoint")
        return f"at most {worst}/255 between the ways of splitting" + "".join(f"; {n}: flat without ToMe" for n in flat)

    def check_sizes(self) -> str:
        """264x328 and 200x264 pixels are merged at every level"""
        for width, height in ((264, 328), (200, 264)):
            plain = self.make(width=width, height=height).image
            for method in ("sample", "merge"):
                reply = self.make({**ON, "method": method}, width=width, height=height)
                other(reply.image, plain, f"{width}x{height} {method}")
        if NO_LEVEL in self.server.said or NO_GRID in self.server.said:
            raise Failed("a layer was left alone: see the log")
        return ""

    def check_hires(self) -> str:
        """Hires fix, with a ratio of its own"""
        request = self.server.hires
        same_ratio = self.make(ON, **request)
        own = self.make({**ON, "hires_ratio": 0.25}, **request)
        none = self.make({**ON, "hires_ratio": 0.0}, **request)
        other(same_ratio.image, self.before["hires"], "hires")
        other(own.image, same_ratio.image, "a ratio of its own")
        other(none.image, own.image, "ratio 0 in the hires pass")
        same(self.make(ON, **request).image, same_ratio.image, "hires again")
        if "ToMe hires ratio: 0.25" not in own.text:
            raise Failed(f"the text does not tell: {own.text}")
        self._plain("hires fix")
        return ""

    def check_img2img(self) -> str:
        """img2img and inpainting"""
        for name, request, within in (
            ("img2img", {"path": "img2img", "init_images": [png(self.source)], "denoising_strength": 0.75}, 0),
            ("inpaint", inpainting(self.source), self.host.inpaint_apart),
        ):
            plain, image = self.make(**request).image, self.make(ON, **request).image
            other(image, plain, name)
            if within and apart(image, plain) <= within:
                raise Failed(f"{name}: no more apart than two equal requests")
            same(self.make(ON, **request).image, image, f"{name} again", within)
            same(self.make([True, 0.0], **request).image, plain, f"{name} at ratio 0", within)
        return f"two equal inpainting requests without ToMe: {within}/255 apart" if within else ""

    def check_samplers(self) -> str:
        """Samplers of every kind"""
        done = []
        for sampler in ("Euler a", "Heun", "DPM++ 2M", "DPM++ SDE", "DPM2", "DDIM", "UniPC", "LCM"):
            plain = self.make(sampler_name=sampler)
            if plain.status != 200:
                continue
            image = self.make(ON, sampler_name=sampler).image
            other(image, plain.image, sampler)
            same(self.make(ON, sampler_name=sampler).image, image, f"{sampler} again")
            done.append(sampler)
        return ", ".join(done)

    def check_schedule(self) -> str:
        """Start and end by noise"""
        full, late = self.make(ON).image, self.make({**ON, "start": 0.5}).image
        other(late, full, "start 0.5")
        other(late, self.before["plain"], "start 0.5")
        plain = self.before["plain"]
        return f"mean difference {mean(late, plain):.1f} from half way on, {mean(full, plain):.1f} all the way"

    def check_optimizations(self) -> str:
        """Every attention optimization, keys with weights included"""
        if self.forge:
            raise Skipped("chosen at the start in this host")
        was = self.server.call("options").body["cross_attention_optimization"]
        names = [
            "None", "InvokeAI", "Doggettx", "V1 - original v1", "sub-quadratic", "sdp - scaled dot product",
            "sdp-no-mem - scaled dot product without memory efficient attention",
        ]  # fmt: skip
        done, first = [], {}
        try:
            for name in names:
                self.server.post("options", {"cross_attention_optimization": name})
                plain = self.make().image
                for method in ("merge", "sample"):
                    size = {"width": 264, "height": 200}  # odd, so that `sample` has weights too
                    # Own tokens are kept by some of them alone, which makes another picture.
                    reply = self.make({**ON, "method": method, "own_token": False}, **size)
                    first.setdefault(method, reply.image)
                    if mean(reply.image, first[method]) > 1.0:
                        raise Failed(f"{name}, {method}: mean {mean(reply.image, first[method]):.2f} from the others")
                same(self.make().image, plain, f"{name}, without ToMe after it")
                done.append(name.split(" - ")[0])
        finally:
            self.server.post("options", {"cross_attention_optimization": was})
        if NO_WEIGHTS in self.server.said:
            raise Failed("an optimization took no weights: see the log")
        return ", ".join(done)

    def check_own_token(self) -> str:
        """Own token: another picture where queries keep theirs, elsewhere the same one, and log and text say so"""
        if self.forge:  # chosen at the start in this host
            return self._own_token()
        was = self.server.call("options").body["cross_attention_optimization"]
        found = {}
        try:
            for name in ("sdp - scaled dot product", "Doggettx"):
                self.server.post("options", {"cross_attention_optimization": name})
                found[name.split(" - ")[0]] = self._own_token()
        finally:
            self.server.post("options", {"cross_attention_optimization": was})
        old = NO_LSE in self.server.said
        if not found["Doggettx"].startswith("refused") or (found["sdp"].startswith("refused") and not old):
            raise Failed(str(found))
        return ", ".join(f"{name}: {what}" for name, what in found.items())

    def _own_token(self) -> str:
        """With the attention optimization in use: "kept" or "refused"."""
        before = len(self.server.said)
        drawn, own = (self.make({**ON, "own_token": wanted}) for wanted in (False, True))
        other(drawn.image, self.before["plain"], "without own tokens")
        same(self.make({**ON, "own_token": True}).image, own.image, "own tokens again")
        if self.host.takes_text:
            same(self.server.post("txt2img", {**BASE, "infotext": own.text}).image, own.image, "from its text")
        refused = NOT_KEPT in self.server.said[before:]
        if refused != ("ToMe own token: False" in own.text):
            raise Failed(f"refused: {refused}, and the text is {own.text}")
        if refused:
            same(own.image, drawn.image, "own tokens, which were refused")
            return "refused, and the text says so"
        other(own.image, drawn.image, "own tokens")
        return f"kept, mean difference {mean(own.image, drawn.image):.1f}"

    def check_exact(self) -> str:
        """Exact every: nearer to the unmerged picture, and gone after; on a transformer it says that it does nothing"""
        if self.forge:
            return self._exact()
        was = self.server.call("options").body["cross_attention_optimization"]
        try:
            self.server.post("options", {"cross_attention_optimization": "sdp - scaled dot product"})
            return self._exact()
        finally:
            self.server.post("options", {"cross_attention_optimization": was})

    def _exact(self) -> str:
        before, tome = len(self.server.said), {**ON, "ratio": 0.75}
        plain, drawn, exact = self.make(), self.make(tome), self.make({**tome, "exact_every": 2})
        same(self.make({**tome, "exact_every": 2}).image, exact.image, "exact every 2 again")
        same(self.make().image, plain.image, "without ToMe after it")
        if self.transformer:
            same(exact.image, drawn.image, "exact every on a transformer")
            if NOT_EXACT not in self.server.said[before:]:
                raise Failed("nothing is said of it")
            return "nothing is gained on a transformer, and the log says so"
        far, near = mean(drawn.image, plain.image), mean(exact.image, plain.image)
        if not near < far or "ToMe exact every: 2" not in exact.text:
            raise Failed(f"mean difference {near:.2f}, without it {far:.2f}; the text is {exact.text}")
        return f"mean difference {near:.1f}, without it {far:.1f}"

    def check_nothing(self) -> str:
        """Where nothing is merged: bit-equal, the log says why once, the text claims nothing"""
        # Between two of the four steps: the last is at the end of the model's time, so no start is behind it.
        few, between = {"min_tokens": 2**20}, {"min_tokens": 0, "start": 0.4, "end": 0.6}
        for tome, why in ((few, FEW), (between, NO_STEPS)):
            before = len(self.server.said)
            reply = self.make({"ratio": 0.5, **tome})
            same(reply.image, self.before["plain"], f"with {tome}")
            lines = [line for line in self.server.said[before:].splitlines() if why in line]
            if "ToMe ratio" in reply.text or len(lines) != 1:
                raise Failed(f"{tome}: {len(lines)} lines, and the text is {reply.text}")
        return "too few tokens, a start and an end between two steps"

    def check_couple(self) -> str:
        """A cross-attention that another extension replaced sees all tokens, with the option cross_attention too"""
        if self.transformer:
            raise Skipped("a transformer has no such layer")
        for method in ("merge", "prune"):
            tome = {**ON, "method": method, "cross_attention": True}
            before = len(self.server.said)
            with_it, alone = self.make(tome, couple=True), self.make({**tome, "cross_attention": False})
            if "Not placed" in with_it.text:
                raise Failed(f"{method}: {with_it.text}")
            same(with_it.image, alone.image, f"{method}: the other attentions are merged")
            other(self.make(tome).image, with_it.image, f"{method}: cross-attention without the other extension")
            if REPLACED_CROSS not in self.server.said[before:]:
                raise Failed("the log does not say so")
        return ""

    def check_refiner(self) -> str:
        """A refiner of another configuration"""
        models = [model["title"] for model in self.server.call("sd-models").body]
        now = self.server.call("options").body["sd_model_checkpoint"]
        others = [title for title in models if title.split(" ")[0] != str(now).split(" ")[0] and "refiner" in title]
        others = others or [title for title in models if title.split(" ")[0] != str(now).split(" ")[0]]
        if not others:
            raise Skipped("needs a second checkpoint")
        if self.forge:
            raise Skipped("not tried in this host")
        request = {"refiner_checkpoint": others[0], "refiner_switch_at": 0.5, "steps": 6}
        plain, image = self.make(**request).image, self.make(ON, **request).image
        other(image, plain, "the refiner")
        same(self.make(**request).image, plain, "without ToMe after it")
        late = self.make({**ON, "start": 0.6}, **request).image
        other(late, plain, "the refiner's own steps")
        self._plain("a refiner")
        return others[0].split(" ")[0]

    def check_built_in(self) -> str:
        """Built-in token merging goes first, and that is said"""
        settings = {"override_settings": {"token_merging_ratio": 0.5}}
        reply = self.make(ON, **settings)
        same(reply.image, self.make(**settings).image, "with both on")
        if BUILT_IN not in self.server.said:
            raise Failed("the log does not say so")
        if "ToMe ratio" in reply.text:
            raise Failed(f"the text claims it: {reply.text}")
        return ""

    def check_hypertile(self) -> str:
        """HyperTile goes first; after it ToMe works again"""
        options = self.server.call("options").body
        if "hypertile_enable_unet" not in options:
            raise Skipped("not in this host")
        settings = {"override_settings": {"hypertile_enable_unet": True}}
        plain, image = self.make(**settings).image, self.make(ON, **settings).image
        same(image, plain, "on the layers that it tiles", 255)
        if REPLACED_SELF not in self.server.said:
            raise Failed("the log does not say so")
        other(self.make(ON).image, self.make().image, "ToMe after HyperTile")
        return f"mean difference with both {mean(image, plain):.2f}"

    def check_api(self) -> str:
        """A short list keeps the defaults; a bad value is HTTP 422"""
        info = next(s for s in self.server.call("script-info").body if s["name"] == "tome" and not s["is_img2img"])
        names = [argument["label"] for argument in info["args"]]
        short = [argument["value"] for argument in info["args"]][: names.index("Min tokens") + 1]
        reply = self.make([True, 0.4, *short[2:-1], 0])  # with no min tokens, or the small picture would not be merged
        if "ToMe ratio: 0.4, ToMe method: sample, ToMe min tokens: 0" not in reply.text:
            raise Failed(f"the text is {reply.text}")
        for bad in ([True, 7], [True, "0.5"], {"rato": 0.5}, {"method": "tomato"}, {"start": 0.9, "end": 0.1}):
            answer = self.make(bad)
            if answer.status != 422 or "ToMe: " not in str(answer.body):
                raise Failed(f"{bad}: HTTP {answer.status} {str(answer.body)[:150]}")
        self._plain("refused requests")
        return str(self.make([True, 7]).body["detail"])

    def check_infotext(self) -> str:
        """The picture's text makes the same picture again"""
        tome = {
            **ON, "ratio": 0.45, "method": "merge", "stride_x": 4, "levels": "0,1", "start": 0.25, "reduce": "pick"
        }  # fmt: skip
        reply = self.make(tome)
        if not self.host.takes_text:
            raise Skipped("this host's API takes no text, with or without ToMe")
        again = self.server.post("txt2img", {**BASE, "infotext": reply.text})
        same(again.image, reply.image, "from its text")
        return reply.text[reply.text.index("ToMe ") :].partition(", Version")[0]

    def check_plot(self) -> str:
        """X/Y/Z plot: axes for ratio and method"""
        info = [s for s in self.server.call("script-info").body if "x/y/z" in s["name"] and not s["is_img2img"]]
        if not info:
            raise Skipped("no plot in this host")
        args = [a.get("value") for a in info[0]["args"]]
        labels = info[0]["args"][0].get("choices") or []
        args[0], args[1] = labels.index("[ToMe] Ratio"), "0, 0.5"
        args[2] = []
        args[3], args[4], args[5] = labels.index("[ToMe] Method"), "", ["sample", "merge"]
        args[6], args[7], args[8] = labels.index("Nothing"), "", []
        names = [a.get("label") for a in info[0]["args"]]
        for place, name in enumerate(names):
            if name == "Include Sub Images":
                args[place] = True
        always = {"ToMe": {"args": [{"enabled": False, "min_tokens": 0}]}}  # the axes switch it on
        reply = self.server.post(
            "txt2img", {**BASE, "script_name": info[0]["name"], "script_args": args, "alwayson_scripts": always}
        )
        images = reply.images
        if len(images) < 5:
            raise Skipped(f"{len(images)} pictures came back")
        same(images[1], images[3], "ratio 0 by two methods")
        other(images[2], images[4], "two methods")
        self._plain("a plot")
        return f"{len(images)} pictures"

    def check_settings(self) -> str:
        """The page has the panel in both tabs, and Settings the defaults"""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server.port}/config", timeout=60) as answer:
            page = answer.read().decode()
        for name in ("script_txt2img_tome_ratio", "script_img2img_tome_method", "setting_tome_ratio"):
            if name not in page:
                raise Failed(f"the page has no {name}")
        return f"{len(set(re.findall('setting_tome_[a-z0-9_]+', page)))} settings"

    def check_last(self) -> str:
        """After all of it: bit-equal to no extension at all, no traceback of ours in the log"""
        self._plain("everything")
        found = own_tracebacks(self.server.said)
        if found:
            raise Failed(f"{len(found)}, see the log; the last: {found[-1].splitlines()[-1].strip()}")
        return ""


def first_run(server: Server) -> tuple[dict[str, np.ndarray], Host]:
    """The pictures of a host that has no ToMe, and what is to be known of it."""
    found = {"plain": server.make().image, "hires": server.make(**server.hires).image}
    same(server.make().image, found["plain"], "the host itself does not repeat")
    if found["plain"].std() < 3:
        raise SystemExit("the checkpoint's picture is flat; choose another checkpoint or seed")
    source = Image.fromarray(found["plain"].astype(np.uint8))
    found["inpaint"], again = (server.make(**inpainting(source)).image for _ in range(2))
    takes_text = server.post("txt2img", {**BASE, "infotext": "a, Steps: 1"}).status == 200
    return found, Host(apart(found["inpaint"], again), takes_text)


def version_of(folder: Path) -> str:
    """What the checkout says of itself."""
    for name in ("CHANGELOG.md", "NEWS.md"):
        path = folder / name
        if path.exists():
            line = next((line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("## ")), "")
            return line[3:].strip()
    return "unknown"


def run_list(checks: List, only: str) -> list[tuple[str, str, str]]:
    rows = []
    for name in [name for name in vars(List) if name.startswith("check_") and re.search(only, name)]:
        method: Callable[[], str] = getattr(checks, name)
        started = time.monotonic()
        try:
            result, detail = "right", method()
        except Skipped as reason:
            result, detail = "not run", str(reason)
        except Failed as reason:
            result, detail = "WRONG", str(reason)
        except Exception as error:
            result, detail = "WRONG", f"{type(error).__name__}: {error}"
        rows.append(((method.__doc__ or name).strip(), result, detail))
        print(f"{result:8} {rows[-1][0]} ({time.monotonic() - started:.0f} s) {detail}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="of the pictures (default: 256)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only checks whose name has this")
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, own = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    BASE.update(width=options.size, height=options.size)
    folder = link.find_host(options.folder, link.A1111)
    link.remove(folder, link.A1111)
    shutil.rmtree(folder / "extensions" / "tome-host-test", ignore_errors=True)  # of a run that was cut short
    logs = Path(tempfile.mkdtemp(prefix="tome-host-"))
    helper = folder / "extensions" / "tome-host-test"
    print(f"logs: {logs}", flush=True)
    server = Server(folder, own, logs / "without.log")
    try:
        before, host = first_run(server)
    finally:
        server.stop()
    try:
        print(link.add(folder, link.A1111))
        (helper / "scripts").mkdir(parents=True, exist_ok=True)
        (helper / "scripts" / "tome_host_test.py").write_text(HELPER)
        server = Server(folder, own, logs / "with.log")
        try:
            rows = run_list(List(server, before, folder, host), options.only)
        finally:
            server.stop()
    finally:
        shutil.rmtree(helper, ignore_errors=True)
        link.remove(folder, link.A1111)
    table = ["| what | result | detail |", "|---|---|---|"]
    table += [f"| {what} | {result} | {detail.replace('|', '/')} |" for what, result, detail in rows]
    if options.markdown:
        options.markdown.write_text("\n".join(table) + "\n", encoding="utf-8")
    count = {word: sum(result == word for _, result, _ in rows) for word in ("right", "WRONG", "not run")}
    print(f"{folder.name} {version_of(folder)}: {', '.join(f'{number} {word}' for word, number in count.items())}")
    return 1 if count["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
