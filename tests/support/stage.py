"""What the pages take for granted, small: models of random weights, texts, files of other tools, stores and runs.

Each thing is made once for a process, by the recipe of its name, when a page first asks for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from support.pages import ROOT, fault, rewritten, run, steps, why_not

END = "<|endoftext|>"
SENTENCE = "The capital of France is Paris. What is your physical form? The form I have is a program.\n"
# What each page needs at its beginning, beside the texts.
GIVEN = {
    "README.md": ["gpt2"],
    "docs/datasets.md": ["gpt2", "smollm2", "a.jsonl", "files", "monday.zarr", "tuesday.zarr", "wednesday.zarr"],
    "docs/loading.md": ["shuffled.zarr"],
    "docs/training.md": ["shuffled.zarr", "several.zarr", "smollm2", "heldout"],
    "docs/features.md": ["activations.zarr", "shuffled.zarr"],
    "docs/interactions.md": ["layer12.sae", "layer16.sae", "layer12.features", "layer16.features"],
    "docs/view.md": ["activations.zarr", "run"],
    "docs/probing.md": ["smollm2", "heldout", "run", "run12", "run20", "activations.features"],
    "docs/scaling.md": [],
    "docs/reliability.md": [],
    "docs/architecture.md": [],
    "docs/guide.md": ["smollm2", "tuesday"],
}


def _stream() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Batches as somebody's own pipeline gives them."""
    dice = np.random.default_rng(0)
    for _ in range(20):
        yield {"document": dice.integers(0, 40, 256), "position": dice.integers(0, 99, 256)}


# Names that the programs of a page use and do not define.
NAMES: dict[str, dict[str, Any]] = {
    "README.md": {"n": 500},
    "docs/loading.md": {"step": lambda rows: None, "my_dataloader": _stream()},
    "docs/training.md": {n: np.zeros((2, 5, 16), np.float32) for n in ("rows", "a", "b")},
}


class Stage:
    """Things by name, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            RECIPES[name](self, path)
        return path

    def lay(self, page: str, scratch: Path) -> None:
        """Put what a page needs into its scratch folder."""
        for name in ["corpus", *GIVEN[page]]:
            made = self(name)
            if name == "files":
                shutil.copytree(made, scratch, dirs_exist_ok=True)
            elif made.is_dir():
                shutil.copytree(made, scratch / name)
            else:
                shutil.copy(made, scratch / name)


def _texts(stage: Stage, path: Path, sections: slice = slice(None)) -> None:
    """The sections of the licence, which says the same in every version and on every machine."""
    path.mkdir()
    text = re.sub(r"\n[ \t]+", "\n", (ROOT / "LICENSE").read_text())
    for section in re.split(r"\n(?=\d+\. [A-Z])", text)[sections]:
        title = re.sub(r"[^a-z]+", "-", section.strip().split(".")[1].lower() if section[0].isdigit() else "licence")
        (path / f"{title.strip('-')}.txt").write_text(SENTENCE * 3 + section)


def _jsonl(stage: Stage, path: Path) -> None:
    path.write_text('{"text": "The capital of France is Paris."}\n{"text": "def form(text): return text"}\n')


def _tokenizer(stage: Stage) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [p.read_text() for p in sorted(stage("corpus").iterdir())]
    core.train_from_iterator([*texts, SENTENCE * 50], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token=END)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def _model(kind: str, layers: int) -> Callable[[Stage, Path], None]:
    def make(stage: Stage, path: Path) -> None:
        import torch
        import transformers

        torch.manual_seed(0)
        words = _tokenizer(stage)
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=600, n_embd=16, n_layer=layers, n_head=2, n_positions=128, initializer_range=0.3
            )
            model: Any = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.LlamaConfig(
                vocab_size=600,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                initializer_range=0.3,
                attn_implementation="eager",
            )
            model = transformers.LlamaForCausalLM(config)
        model.eval().save_pretrained(path)
        words.save_pretrained(path)

    return make


def _files(stage: Stage, path: Path) -> None:
    """Files that `import` takes: .npy, a memmap, and the cache of another tool."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    path.mkdir()
    dice = np.random.default_rng(1)
    np.save(path / "acts.npy", dice.standard_normal((300, 16)).astype(np.float32))
    np.save(path / "tokens.npy", dice.integers(0, 600, 300).astype(np.int32))
    dice.standard_normal((30, 4096)).astype(np.float16).tofile(path / "memmap.bin")
    features = Features(
        {"blocks.0.hook_mlp_out": Array2D((8, 16), "float32"), "token_ids": Sequence(Value("int32"), length=8)}
    )
    rows = {
        "blocks.0.hook_mlp_out": [dice.standard_normal((8, 16)).astype(np.float32) for _ in range(40)],
        "token_ids": [dice.integers(0, 600, 8).astype(np.int32).tolist() for _ in range(40)],
    }
    Dataset.from_dict(rows, features=features).save_to_disk(path / "saelens-cache")


def _collected(text: str, **options: Any) -> Callable[[Stage, Path], None]:
    def make(stage: Stage, path: Path) -> None:
        import actshuffle

        more = {"model": "smollm2", "layers": [12], **options}
        name = more.pop("model")
        with contextlib.chdir(stage.folder):
            stage(name), stage(text)
            actshuffle.collect(name, [text], path, prefix=END, **more)

    return make


def _shuffled(stage: Stage, path: Path) -> None:
    import actshuffle

    actshuffle.shuffle(stage("activations.zarr"), path, seed=0)


def _several(stage: Stage, path: Path) -> None:
    """Two layers, and an input with its output."""
    import zarr

    import actshuffle

    dice, source = np.random.default_rng(2), stage.folder / "several.rows"
    group, features = zarr.create_group(source), dice.random((6000, 12), np.float32) ** 8
    for name in ("mlp_in", "mlp_out", "layer_6", "layer_12"):
        rows = features @ dice.standard_normal((12, 16), np.float32)
        group.create_array(name, data=rows, chunks=(2000, 16))
    actshuffle.shuffle(source, path, seed=0)


def _run(**options: Any) -> Callable[[Stage, Path], None]:
    def make(stage: Stage, path: Path) -> None:
        import actshuffle
        import saetrain

        name, store = f"layer_{options.pop('layer', 12)}", stage.folder / "layers.shuffled"
        if not store.exists():
            _collected("corpus", layers=[12, 16, 20])(stage, stage.folder / "layers.zarr")
            actshuffle.shuffle(stage.folder / "layers.zarr", store, seed=0)
        settings = {"k": 8, "steps": 8, "batch_size": 512, "field": name, "d_sae": 128, **options}
        saetrain.fit(store, out=path, progress=False, **settings)

    return make


def _features(run_name: str, field: str) -> Callable[[Stage, Path], None]:
    def make(stage: Stage, path: Path) -> None:
        import saetrain

        saetrain.build_features(stage(run_name), stage.folder / "layers.zarr", path, field=field, keep_codes=True)

    return make


RECIPES: dict[str, Callable[[Stage, Path], None]] = {
    "corpus": _texts,
    "heldout": lambda stage, path: _texts(stage, path, slice(1, 5)),
    "tuesday": lambda stage, path: _texts(stage, path, slice(4, 8)),
    "a.jsonl": _jsonl,
    "gpt2": _model("gpt2", 6),
    "smollm2": _model("llama", 21),
    "files": _files,
    "activations.zarr": _collected("corpus"),
    "acts.zarr": _collected("corpus"),
    "monday.zarr": _collected("corpus", model="gpt2", layers=[3, 5]),
    "tuesday.zarr": _collected("heldout", model="gpt2", layers=[3, 5]),
    "wednesday.zarr": _collected("tuesday", model="gpt2", layers=[3, 5]),
    "shuffled.zarr": _shuffled,
    "several.zarr": _several,
    "run": _run(d_sae=1024, k=256),
    "run12": _run(),
    "run20": _run(layer=20),
    "layer12.sae": _run(),
    "layer16.sae": _run(layer=16),
    "activations.features": _features("run", "layer_12"),
    "layer12.features": _features("layer12.sae", "layer_12"),
    "layer16.features": _features("layer16.sae", "layer_16"),
}


def play(page: str, text: str, stage: Stage, scratch: Path) -> Iterator[tuple[Any, str]]:
    """Run the steps of a page in order in a scratch folder, and yield each with what it printed."""
    stage.lay(page, scratch)
    names = dict(NAMES.get(page, {}))
    with contextlib.chdir(scratch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in steps(page, text):
            if not why_not(step):
                yield step, run(step, names)


def pages() -> list[str]:
    """The pages with something to run."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    named = [page.relative_to(ROOT).as_posix() for page in found if page.name != "api.md"]
    return [name for name in named if next(steps(name, (ROOT / name).read_text()), None)]


def write_pages(wanted: list[str]) -> None:
    """Write the outputs of pages anew, where their form has changed."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder) / "stage")
        stage.folder.mkdir()
        for number, page in enumerate(wanted or pages()):
            scratch = Path(folder) / f"{number}" / "work"
            scratch.mkdir(parents=True)
            text, printed = (ROOT / page).read_text(), {}
            for step, output in play(page, text, stage, scratch):
                printed[step.line] = output.replace(f"{os.path.realpath(scratch)}/", "")
                if fault(step, printed[step.line]):
                    print(f"written: {step.name}", file=sys.stderr)
            (ROOT / page).write_text(rewritten(page, text, printed))
