"""The commands and programs on the pages, run in order on a small collection, and the outputs that the pages show.

A block of code holds commands (one a line), or commands behind ``$ `` with their output below them, or Python.
Blocks that begin with no known program are pictures.  ``python tests/support/pages.py`` writes outputs anew.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
OURS = ("actshuffle", "saetrain")
# Programs of others, and why their lines are not run.
OTHERS = {
    "pip": "installs",
    "make": "runs longer than all pages; `make demo` and `make test` are run by themselves",
    "python3": "makes an environment",
    "peers/bin/python": "needs packages that no environment has beside ours",
    "torchrun": "starts processes; tests/sae/test_sae_machines.py does so",
    "openssl": "makes certificates; tests/engine/test_network.py does so",
    "chmod": "is of the lines around it",
    "dask": "starts a cluster; tests/engine/test_hosts.py does so",
    "helm": "needs Kubernetes",
}
# Commands and programs of ours that are not run, by the page and their beginning, and why.
NOT_RUN = {
    ("docs/training.md", "saetrain fit shuffled.zarr --nproc"): "starts processes; tests/sae/test_sae_ranks.py does so",
    ("docs/guide.md", "saetrain view"): "serves until Ctrl-C; tests/sae/test_sae_view.py does so",
    ("docs/view.md", "saetrain view"): "serves until Ctrl-C; tests/sae/test_sae_view.py does so",
    ("docs/scaling.md", "actshuffle plan --row-bytes 8KiB --hosts 200"): "simulates for up to half a minute",
    ("docs/scaling.md", "actshuffle plan acts.zarr --workers 2"): "shows the free memory of a machine",
    ("docs/scaling.md", "actshuffle run /shared"): "needs a cluster; tests/engine/test_hosts.py has one",
    ("docs/scaling.md", "actshuffle run s3://"): "needs a bucket; tests/storage/test_s3.py has one",
    ("docs/scaling.md", "import actshuffle\nfrom dask_jobqueue"): "needs SLURM",
    ("docs/scaling.md", "from dask_kubernetes"): "needs Kubernetes",
    ("docs/architecture.md", "from actshuffle.jobs"): "is a sketch; tests/jobs/test_folder.py runs such a job",
}


SHORT = [
    "--steps",
    "8",
    "--batch-size",
    "256",
    "--eval-every",
    "8",
]  # added where training is as long as the rows ask for


@dataclass(frozen=True)
class Step:
    """One command, with the output that the page shows (None: it shows none), or one Python program."""

    page: str
    line: int
    text: str
    shown: str | None = None
    python: bool = False

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line} {self.text.splitlines()[0]}"


@dataclass(frozen=True)
class Block:
    """A block of code: its kind ("python", "" or the name of another fence), first line, and lines as on the page."""

    kind: str
    line: int
    lines: list[str]
    indent: str


def blocks(text: str) -> Iterator[Block]:
    fence, first, held = None, 0, list[str]()
    before = ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if fence is not None:
            if line.startswith("```"):
                yield Block(fence, first, held, "")
                fence, held = None, []
            else:
                held.append(line)
        elif line.startswith("```"):
            if held:
                yield Block("", first, _trimmed(held), "    ")
                held = []
            fence, first = line[3:].strip(), number + 1
        elif line.startswith("    ") and (held or not before.strip()):
            first = first if held else number
            held.append(line[4:])
        elif held and (line.strip() or number > len(text.splitlines())):
            yield Block("", first, _trimmed(held), "    ")
            held = []
        elif held:
            held.append("")
        before = line


def _trimmed(lines: list[str]) -> list[str]:
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def steps(page: str, text: str) -> Iterator[Step]:
    """What a page says can be run, in order.

    Raises
    ------
    ValueError : a block mixes commands with lines that are none.
    """
    for block in blocks(text):
        if block.kind == "python":
            yield Step(page, block.line, "\n".join(block.lines), python=True)
            continue
        marked = any(line.startswith("$ ") for line in block.lines)
        known = [_program(line) in (*OURS, *OTHERS) for line in block.lines]
        if not marked and not any(known):
            continue
        at = 0
        while at < len(block.lines):
            start, line = at, block.lines[at]
            while line.endswith("\\"):
                at += 1
                line = line[:-1].rstrip() + " " + block.lines[at].strip()
            at += 1
            if not line.strip():
                continue
            if _program(line) not in (*OURS, *OTHERS):
                raise ValueError(
                    f"{page}:{block.line + start}: {line!r} is no command, and no output of one behind '$ '"
                )
            shown = None
            if marked:
                end = at
                while end < len(block.lines) and not block.lines[end].startswith("$ "):
                    end += 1
                shown, at = "\n".join(block.lines[at:end]).strip("\n"), end
            yield Step(page, block.line + start, line.removeprefix("$ "), shown)


def _program(line: str) -> str:
    return line.removeprefix("$ ").split(" ", 1)[0]


def why_not(step: Step) -> str:
    """Why a step is not run, or an empty text."""
    for (page, beginning), reason in NOT_RUN.items():
        if step.page == page and step.text.startswith(beginning):
            return reason
    return "" if step.python else OTHERS.get(_program(step.text), "")


# --- Running ------------------------------------------------------------------------------------------------


def run(step: Step, names: dict[str, Any]) -> str:
    """Run a step in the working folder, and return what it prints on stdout; a refusal is an AssertionError."""
    if step.python:
        text = re.sub(r"workers=\d+", "workers=0", step.text)
        text = re.sub(
            r"saetrain\.fit\(([^)]*)\)",
            r"saetrain.fit(\1, steps=8, batch_size=256, eval_every=8, progress=False)",
            text,
        )
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(text, step.name, "exec"), names)
        return out.getvalue()
    from actshuffle.cli.app import main as actshuffle_main
    from saetrain.cli.app import command_line as saetrain_main

    program, *arguments = shlex.split(step.text, comments=True)
    main: Any = {"actshuffle": actshuffle_main, "saetrain": saetrain_main}[program]
    command = main.get_command(click.Context(main), arguments[0])
    if any(p.name == "workers" for p in getattr(command, "params", ())):  # clusters of processes have their own tests
        at = arguments.index("--workers") if "--workers" in arguments else len(arguments)
        arguments[at : at + 2] = ["--workers", "0"]
    if arguments[0] in ("fit", "sweep") and "--steps" not in arguments:  # by default as many as the rows need
        arguments += SHORT
    before = sys.argv[0]
    sys.argv[0] = program
    try:
        found = CliRunner().invoke(main, _globbed(arguments), prog_name=program)
    finally:
        sys.argv[0] = before
    if found.exit_code:
        raise AssertionError(f"{step.name}\nexit {found.exit_code}\n{found.output}\n{found.exception!r}")
    return found.stdout


def _globbed(arguments: list[str]) -> list[str]:
    """Patterns of files as a shell expands them."""
    found: list[str] = []
    for word in arguments:
        paths = sorted(str(p) for p in Path().glob(word)) if "*" in word else []
        found += paths or [word]
    return found


FIGURE = r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


def form(text: str) -> str:
    """A text without what another run may change: figures and their units, folders, blanks."""
    text = re.sub(re.escape(str(Path.cwd())) + "/?", "", text)
    text = re.sub(rf"{FIGURE} ?(?:[kKMGTP]i?)?B(/s)?\b", "SIZE", text)
    text = re.sub(rf"{FIGURE} ?(?:ms|s|min|h)\b(?: \d+ (?:s|min)\b)?", "TIME", text)
    text = re.sub(FIGURE, "#", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines() if line.strip())


def fault(step: Step, printed: str) -> str:
    """How the output on the page differs from what was printed, or an empty text."""
    if step.shown is None or form(step.shown) == form(printed):
        return ""
    return f"{step.name}\nthe page shows\n{step.shown}\nand the command prints\n{printed}"


# --- Writing ------------------------------------------------------------------------------------------------


def rewritten(page: str, text: str, printed: dict[int, str]) -> str:
    """The page with the outputs of its steps, by line of the step; as it is if none has another form."""
    if not any(fault(step, printed[step.line]) for step in steps(page, text) if step.line in printed):
        return text
    lines = text.splitlines()
    for block in reversed(list(blocks(text))):
        for step in reversed([s for s in steps(page, text) if block.line <= s.line < block.line + len(block.lines)]):
            if step.shown is None or step.line not in printed:
                continue
            start = step.line  # the line after the command's first one, counted from 0
            while lines[start - 1].endswith("\\"):
                start += 1
            end = start
            last = block.line - 1 + len(block.lines)
            while end < last and not lines[end].removeprefix(block.indent).startswith("$ "):
                end += 1
            shown = [(block.indent + x).rstrip() for x in printed[step.line].replace(f"{Path.cwd()}/", "").splitlines()]
            lines[start:end] = [*shown, *([""] if end < last else [])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.stage import write_pages

    write_pages(sys.argv[1:])
