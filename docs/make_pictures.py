"""Take the pictures of docs/pages from the result of `make demo-steer`, in Chromium.

    python docs/make_pictures.py [demo/smollm2]

It multiplies the demo's dictionary with itself for the view of interactions, serves the page, and takes each view.
The label that they show is in a file of its own, and not in the demo.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import sync_playwright

PAGES = Path(__file__).parent / "pages"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FEATURE, OTHER = 3550, 2224  # active on "inflation", and on "growth"
TEXT = (
    "Our thanks are due to Almighty God, and to the farmers of this country, who have kept inflation low while the "
    "nations of Europe were at war."
)
PROMPT = "What is your physical form?"
VIEWS = {  # name: (address, height)
    "overview": ("", 1000),
    "feature": (f"feature/{FEATURE}", 1300),
    "compare": (f"compare?ids={FEATURE},{OTHER}", 1000),
    "search": ("search?q=peace", 700),
    "text": (f"text?t={quote(TEXT)}", 900),
    "steer": (f"steer?feature={FEATURE}&prompt={quote(PROMPT)}&value=0.6&temperature=0.7&seed=3&tokens=40", 690),
    "interactions": (f"interactions?line={FEATURE}", 960),
    "run": ("run", 1180),
}
PHONE = ("overview", "feature", "text", "run")


def main(demo: Path) -> None:
    with tempfile.TemporaryDirectory() as work, sync_playwright() as started:
        product, labels = Path(work) / "pairs", Path(work) / "labels.json"
        run = demo / "sae"
        how = ["--product", "encoder-decoder", "--cosine", "--drop-same", "--k", "16", "--over", "0.1", "--over", "0.2"]
        call("interactions", str(run), str(run), str(product), *how)
        labels.write_text(json.dumps({"format": 1, "labels": {str(FEATURE): "inflation, the economy"}}))
        opened = started.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        shown = [
            "--run",
            str(run),
            "--model",
            str(demo / "model"),
            "--model-dtype",
            "bfloat16",
            "--interactions",
            str(product),
        ]
        with served(str(demo / "acts.features"), *shown, "--labels", str(labels)) as url:
            for name, (path, height) in VIEWS.items():
                page = opened.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
                look(page, url + path)
                keep(page, name)
                page.close()
            phones = [phone(opened, url + VIEWS[name][0]) for name in PHONE]
        page = opened.new_page(viewport={"width": 4 * 390 + 3 * 20, "height": 844})
        pictures = "".join(f'<img width="390" src="data:image/png;base64,{data}">' for data in phones)
        page.set_content(f'<body style="margin:0;display:flex;gap:20px;background:#888">{pictures}')
        keep(page, "phone-dark")
        opened.close()


def phone(opened: Any, url: str) -> str:
    """A view at the size of a phone, in dark colours, as base64."""
    page = opened.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    look(page, url)
    return base64.b64encode(page.screenshot()).decode()


def look(page: Any, url: str) -> None:
    """Open a view, and wait until all of it is there; in the view of steering, until the texts are written."""
    page.goto(url)
    page.wait_for_selector("main[data-ready] h1")
    if "/steer" in url:
        page.get_by_role("button", name="Write").click()
        page.get_by_text("Edited rows moved by").wait_for(timeout=300_000)
        page.mouse.move(5, 5)
    page.wait_for_load_state("networkidle")


def keep(page: Any, name: str) -> None:
    """Save what is seen in 256 colours, which is a third of the bytes."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(PAGES / f"{name}.png", optimize=True)


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of a page that is served until the end of the block."""
    command = [sys.executable, "-m", "saetrain", "view", *arguments, "--no-open", "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait()


def call(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "saetrain", *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/smollm2"))
