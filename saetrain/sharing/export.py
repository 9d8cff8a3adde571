"""`export_features`: the job that writes a result in one of the formats, batch by batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actshuffle.jobs import FolderJob, FolderTask, Outcome, Step, read_done, run_in_folder
from saetrain.errors import ExchangeError
from saetrain.features.dictionary import Dictionary
from saetrain.reading.latents import open_features
from saetrain.sharing import bulk, dashboards, delphicache, graphpages
from saetrain.sharing.dashboards import Row
from saetrain.sharing.naming import Names
from saetrain.sharing.sheet import Sheet

BATCH = 128  # latents of a file, as SAEDashboard writes them
LENGTH = 256  # tokens of a sequence of delphi

Written = tuple[dict[str, Any], int]


def export_features(
    features: str | Path,
    to: str | Path,
    format: str,
    names: Names,
    *,
    store: str | Path | None = None,
    length: int = LENGTH,
    batch: int = BATCH,
    **how: Any,
) -> Outcome:
    """Write a finished result of `saetrain features` for another tool; the same call resumes.

    Parameters
    ----------
    features : the result; `store` says where its store of activations is, if it has moved.
    to : a new or empty folder, or one that the same call left.
    format : "saedashboard", "neuronpedia", "graph" or "delphi"; docs/features.md says what each holds.
    names : what model, layer and dictionary are called there.
    length : tokens of a sequence, for delphi.
    batch : latents of a file or task.
    how : `executor`, `progress`, `overwrite`, `fsync` of `actshuffle.jobs.run_in_folder`.

    Raises
    ------
    ExchangeError : the format needs what the result does not have; nothing is written.
    """
    if format not in FORMATS:
        raise ExchangeError(f"formats are {', '.join(FORMATS)}; got {format!r}")
    found = open_features(features, store=store)
    if found.store is None:
        where = store or found.facts["store"]
        raise ExchangeError(f"{features}: examples need the tokens of its store, and {where} is not that store")
    if found.facts["token"] is None:
        raise ExchangeError(f"{features}: examples need the tokens of its store, and it has none")
    settings = {
        "features": str(Path(features).absolute()) if "://" not in str(features) else str(features),
        "identity": (read_done(features) or {}).get("job"),
        "store": None if store is None else str(store),
        "format": format,
        "names": asdict(names),
        "length": length,
        "batch": batch,
    }
    write, publish = FORMATS[format]
    size = batch
    if format == "delphi":
        delphicache.check(found, length)
        size = found.facts["chunk"]
    steps = [Step("batch", write, -(-len(found) // size), is_there)]
    return run_in_folder("features for other tools", to, settings, steps, publish=publish, **how)


def is_there(job: FolderJob, task: FolderTask, receipt: dict[str, Any]) -> bool:
    return all(job.objects.size(key) is not None for key in receipt["keys"])


class _Batch:
    """What a task works on."""

    def __init__(self, job: FolderJob, number: int = 0) -> None:
        self.job, self.settings = job, job.settings
        self.names = Names(**self.settings["names"])
        self.features = open_features(self.settings["features"], store=self.settings["store"])
        size = self.settings["batch"]
        self.lo, self.hi = number * size, min((number + 1) * size, len(self.features))
        self.keys: list[str] = []
        self.nbytes = 0

    def rows(self) -> list[Row]:
        """The decoder rows of the latents, or None for each where the dictionary is gone or another."""
        facts = self.features.facts
        if not Path(facts["dictionary"]).exists() or (found := Dictionary(facts["dictionary"])).digest != facts["sae"]:
            return [None] * (self.hi - self.lo)
        return [*found.rows(self.lo, self.hi)["W_dec"].float().numpy()]

    def sheets(self) -> list[tuple[Sheet, Row]]:
        return [(Sheet(self.features[self.lo + i]), row) for i, row in enumerate(self.rows())]

    def put(self, key: str, data: bytes) -> None:
        self.job.objects.put(key, data)
        self.keys.append(key)
        self.nbytes += len(data)

    def written(self, **more: Any) -> Written:
        return {"keys": self.keys, **more}, self.nbytes


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# --- Each format: a task, and the end -----------------------------------------------------------


def write_dashboards(job: FolderJob, task: FolderTask) -> Written:
    on = _Batch(job, task.number)
    sheets = on.sheets()
    live = [(sheet, row) for sheet, row in sheets if not sheet.feature.is_dead]
    on.put(f"batch-{task.number}.json", _json(dashboards.batch(live, on.names)))
    return on.written(dead=[sheet.feature.index for sheet, _ in sheets if sheet.feature.is_dead])


def end_dashboards(job: FolderJob) -> dict[str, Any]:
    on = _Batch(job)
    dead = [index for result in job.results("batch") for index in result["dead"]]
    job.objects.put("skipped_indexes.json", _json(dashboards.skipped(dead, on.names)))
    told = {"sae_set": on.names.set, "sae_path": on.features.facts["dictionary"], "n_features_at_a_time": BATCH}
    job.objects.put("run_settings.json", _json(told | {"huggingface_dataset_path": on.names.dataset}))
    return {"latents": len(on.features), "dead": len(dead)}


def write_bulk(job: FolderJob, task: FolderTask) -> Written:
    on = _Batch(job, task.number)
    sheets, folder = on.sheets(), f"{on.names.model}/{on.names.source}"
    neurons = [bulk.neuron(sheet, row, on.names) for sheet, row in sheets]
    on.put(f"{folder}/features/batch-{task.number}.jsonl.gz", bulk.packed(neurons))
    examples = [line for sheet, _ in sheets for line in bulk.activation_lines(sheet, on.names)]
    on.put(f"{folder}/activations/batch-{task.number}.jsonl.gz", bulk.packed(examples))
    return on.written()


def end_bulk(job: FolderJob) -> dict[str, Any]:
    on = _Batch(job)
    width = Dictionary(on.features.facts["dictionary"]).d_in if Path(on.features.facts["dictionary"]).exists() else 0
    for file, row in bulk.tables(on.names, on.features.facts, width).items():
        job.objects.put(f"{on.names.model}/{on.names.source}/{file}", bulk.lines([row]))
    return {"latents": len(on.features)}


def write_pages(job: FolderJob, task: FolderTask) -> Written:
    on, scan = _Batch(job, task.number), Names(**job.settings["names"]).source
    for index in range(on.lo, on.hi):
        sheet = Sheet(on.features[index])
        if not sheet.feature.is_dead:
            on.put(f"features/{scan}/{index}.json", _json(graphpages.page(sheet, scan)))
    return on.written()


def end_pages(job: FolderJob) -> dict[str, Any]:
    return {"files": sum(len(result["keys"]) for result in job.results("batch"))}


def write_cache(job: FolderJob, task: FolderTask) -> Written:
    on = _Batch(job)
    name, held = delphicache.arrays(on.features, task.number, job.settings["length"])
    on.put(f"latents/{on.names.hook_name}/{name}", delphicache.safetensors(held))
    return on.written(entries=len(held["activations"]))


def end_cache(job: FolderJob) -> dict[str, Any]:
    on = _Batch(job)
    key = f"latents/{on.names.hook_name}/config.json"
    job.objects.put(key, delphicache.config(on.features, on.names, job.settings["length"]))
    return {"entries": sum(result["entries"] for result in job.results("batch"))}


FORMATS: dict[str, tuple[Callable[[FolderJob, FolderTask], Written], Callable[[FolderJob], dict[str, Any]]]] = {
    "saedashboard": (write_dashboards, end_dashboards),
    "neuronpedia": (write_bulk, end_bulk),
    "graph": (write_pages, end_pages),
    "delphi": (write_cache, end_cache),
}
