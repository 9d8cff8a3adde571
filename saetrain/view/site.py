"""What the page shows, as plain values for JSON: the server asks, this answers.

Numbers that are not finite are null.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from saetrain.errors import ConfigError
from saetrain.reading.latents import Feature, Features
from saetrain.reading.records import Example
from saetrain.reporting.panels import Panel, themes_of
from saetrain.reporting.when import when
from saetrain.sharing.graphpages import page
from saetrain.sharing.sheet import Sheet
from saetrain.training.log import read_log
from saetrain.training.outcome import read_evaluation
from saetrain.view.labels import Labels
from saetrain.view.lists import QUANTITIES, Filter, Lists
from saetrain.view.live import Live
from saetrain.view.pairs import Pairs

FIRST = 8  # examples that come with a latent; the page asks for the others
PAGE = 100  # latents of one part of a list
COMPARED = 4
ENDS = ("top", "bottom")
FEW, LISTED, OTHERS = 4, 8, 12  # tokens of another latent, tokens in a list, other latents that a page shows
GROUPS = ("stat", "shape", "token", "example", "context", "near", "together", "logit", "hard", "loss")


@dataclass
class Site:
    """The result that is looked at, and what else is at hand: a run's metrics, a model."""

    features: Features
    labels: Labels
    run: Path | None = None
    live: Live | None = None
    products: list[Pairs] = field(default_factory=list)
    origins: frozenset[str] = frozenset()  # sites whose pages may read the JSON of features
    lists: Lists = field(init=False)

    def __post_init__(self) -> None:
        self.lists = Lists(self.features)
        self._shown = lru_cache(maxsize=256)(self._read)

    # --- pages

    def facts(self) -> dict[str, Any]:
        """What the page must know before it shows anything."""
        facts = self.features.facts
        for group in GROUPS:  # opened now, and not with the first feature
            self.features.has(group)
        return {
            "name": Path(self.features.path).name,
            "latents": len(self.features),
            "rows": self.features.rows,
            "documents": facts["documents"],
            "field": facts["field"],
            "store": facts["store"],
            "dictionary": facts["dictionary"],
            "kinds": [*self.features.kinds, *(["hard"] if self.features.has("hard") else [])],
            "orders": [name for name in QUANTITIES if self.lists.has(name)],
            "text": self.features.store is not None and bool(self.features.text([0])),
            "labels": str(self.labels.path),
            "model": self.live and self.live.facts(),
            "run": self.run is not None,
            "interactions": [pairs.facts() for pairs in self.products],
        }

    def overview(self) -> dict[str, Any]:
        return self.lists.overview() | {"labelled": len(self.labels.all())}

    def listing(
        self, filters: list[Filter], order: str, start: int, *, falling: bool, only: str | None = None
    ) -> dict[str, Any]:
        """A part of the live latents that pass the filters, or of the labelled or dead ones, as a list shows it."""
        if only == "labelled":
            chosen = np.array(sorted(self.labels.all()), np.int64)
        elif only == "dead":
            chosen = np.flatnonzero(~self.lists.alive)
        else:
            chosen = self.lists.choose(filters, order, falling=falling)
        some = chosen[start : start + PAGE].tolist()
        return {"total": len(chosen), "start": start, "items": [self.line(latent) for latent in some]}

    def beside(self, latent: int, filters: list[Filter], order: str, *, falling: bool) -> dict[str, int | None]:
        """The latents before and after one in a list; where it is not in that list, those of neighbouring numbers."""
        chosen = self.lists.choose(filters, order, falling=falling)
        at = np.flatnonzero(chosen == latent)
        if not len(at):
            chosen = self.lists.choose([], "index", falling=False)
            below, above = (int(np.searchsorted(chosen, latent, side)) for side in ("left", "right"))
        else:
            below, above = int(at[0]), int(at[0]) + 1
        previous = int(chosen[below - 1]) if below else None
        return {"previous": previous, "next": int(chosen[above]) if above < len(chosen) else None}

    def line(self, latent: int) -> dict[str, Any]:
        """One line of a list."""
        feature = self.features[latent]
        tokens = [t.text if t.text is not None else str(t.id) for t in feature.top_tokens[:LISTED]]
        return {
            "id": latent,
            "label": self.labels.get(latent),
            "density": _number(feature.density.value),
            "max": _number(feature.max),
            "tokens": tokens,
        }

    def briefs(self, latents: list[int]) -> list[dict[str, Any]]:
        """Other latents, as a page about one names them: one read for all."""
        ids = self.features.group("token").take("id", latents)[:, :FEW]
        flat = ids[ids >= 0].tolist()
        texts = iter(self.features.text(flat) or map(str, flat))
        named = zip(latents, (ids >= 0).sum(axis=1).tolist(), strict=True)
        return [{"id": i, "label": self.labels.get(i), "tokens": list(islice(texts, n))} for i, n in named]

    def feature(self, latent: int) -> dict[str, Any]:
        """One latent: all but the examples beyond the first few."""
        if not 0 <= latent < len(self.features):
            raise ConfigError(f"no feature {latent:,}: there are 0 to {len(self.features) - 1:,}")
        told = {"label": self.labels.get(latent), "length": self.live and self.live.length(latent)}
        return {**self._shown(latent), **told}

    def _read(self, latent: int) -> dict[str, Any]:
        f = self.features[latent]
        density, histogram, effect = f.density, f.histogram, f.loss_effect
        numbers = ("count", "documents", "mean", "std", "min", "max")
        return {
            "id": latent,
            "dead": f.is_dead,
            "rows": self.features.rows,
            **{name: _number(getattr(f, name)) for name in numbers},
            "density": {name: _number(value) for name, value in density._asdict().items()},
            "loss": effect and {name: _number(value) for name, value in effect._asdict().items()},
            "histogram": {"edges": _list(histogram.edges), "counts": _list(histogram.counts)},
            "quantiles": [[share, _number(value)] for share, value in f.quantiles.items()],
            "positions": _list(f.by_position),
            "tokens": [t._asdict() | {"mean": _number(t.mean)} for t in f.top_tokens],
            "neighbours": self._neighbours(f),
            "logits": self._logits(f),
            "together": self._together(f),
            "examples": [_example(example) for example in f.top(FIRST)],
        }

    def examples(self, latent: int, kind: str) -> dict[str, Any]:
        """All examples of a kind."""
        f = self.features[latent]
        return {"id": latent, "kind": kind, "examples": [_example(example) for example in f.examples(kind)]}

    def compare(self, latents: list[int]) -> dict[str, Any]:
        """Several latents side by side, and the rows on which examples of two of them lie."""
        if not 1 <= len(latents) <= COMPARED:
            raise ConfigError(f"1 to {COMPARED} features can be compared, not {len(latents)}")
        shown = [self.feature(latent) for latent in latents]
        names = [{e["name"] or e["document"] for e in f["examples"]} - {None} for f in shown]
        common = sorted(set.intersection(*names), key=str) if names else []
        return {"features": shown, "documents": common}

    def search(self, text: str) -> dict[str, Any]:
        """Latents by number, by label, by a token on which they are active, and by a token that they promote."""
        text = text.strip()
        found: dict[str, list[dict[str, Any]]] = {"number": [], "label": [], "token": [], "promoted": []}
        if text.isdecimal() and int(text) < len(self.features):
            found["number"] = [self.line(int(text))]
        lowered = text.lower()
        matching = [latent for latent, label in sorted(self.labels.all().items()) if lowered in label.lower()]
        if text:
            found["label"] = [self.line(latent) for latent in matching[:PAGE]]
            for kind, pairs in (("token", self.lists.by_token(text)), ("promoted", self.lists.by_promoted(text))):
                found[kind] = [self.line(latent) | {"weight": _number(weight)} for latent, weight in pairs[:PAGE]]
        return {"text": text, **found}

    def metrics(self) -> dict[str, Any]:
        """The last figures and the curves of the run that trained the dictionary."""
        if self.run is None:
            raise ConfigError("no run was given; start the page with `saetrain view FEATURES --run RUN`")
        lines = read_log(self.run)
        last = {k: _number(v) for line in lines for k, v in line.items() if isinstance(v, (int, float))}
        trained = when(lines)
        return {
            "run": str(self.run),
            "last": last,
            "when": trained and {"span": trained.span(), "length": trained.length()},
            "themes": [_theme(name, panels) for name, panels in themes_of({"": lines}).items()],
            "evaluation": read_evaluation(self.run),
        }

    def pairs(self, number: int) -> Pairs:
        """One of the products that the page was started with."""
        if number >= len(self.products):
            raise ConfigError(f"no product {number}: the page shows {len(self.products)} of `--interactions`")
        return self.products[number]

    def graph_page(self, scan: str, latent: int) -> dict[str, Any] | None:
        """What pages of attribution graphs read of a latent; None where there is none, or it is dead."""
        if scan != self.scan or latent >= len(self.features) or self.features[latent].is_dead:
            return None
        return page(Sheet(self.features[latent]), scan)

    @property
    def scan(self) -> str:
        """The name under which these latents are served to other pages."""
        return Path(self.features.path).name

    # --- parts that a result may lack

    def _neighbours(self, f: Feature) -> list[dict[str, Any]] | None:
        found = f.neighbours
        if found is None:
            return None
        found = found[:OTHERS]
        briefs = self.briefs([n.latent for n in found])
        return [brief | {"cosine": _number(n.cosine)} for brief, n in zip(briefs, found, strict=True)]

    def _logits(self, f: Feature) -> dict[str, Any] | None:
        found = f.logits
        if found is None:
            return None
        ends = {name: [m._asdict() | {"text": m.text or str(m.id)} for m in getattr(found, name)] for name in ENDS}
        return {**ends, "histogram": {"edges": _list(found.edges), "counts": _list(found.counts)}}

    def _together(self, f: Feature) -> list[dict[str, Any]] | None:
        if not self.features.has("together"):
            return None
        found = f.together[:OTHERS]
        return [
            brief | {"count": c.times, "expected": _number(c.expected), "share": [_number(v) for v in c.share]}
            for brief, c in zip(self.briefs([c.latent for c in found]), found, strict=True)
        ]


def _theme(name: str, panels: list[Panel]) -> dict[str, Any]:
    """The panels of a theme, and those whose value never changed."""
    drawn = [
        {"title": p.title, "x": p.x, "log": p.log, "share": p.share, "end": p.ends.get("")}
        | {"points": p.curves[""], "band": p.bands.get("", [])}
        for p in panels
        if p.constant is None
    ]
    constant = [{"title": p.title, "value": p.constant} for p in panels if p.constant is not None]
    return {"theme": name, "panels": drawn, "constant": constant}


def _example(example: Example) -> dict[str, Any]:
    pieces = example.text or tuple(f" {token}" for token in example.tokens)
    return {
        "kind": example.kind,
        "row": example.row,
        "value": _number(example.value),
        "document": example.document,
        "name": example.document_name,
        "position": example.position,
        "tokens": list(pieces),
        "at": example.at,
        "repeated": example.is_repeated,
        "acts": [round(float(a), 4) for a in example.activations],
    }


def _number(value: Any) -> Any:
    """A value that JSON can hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _list(values: Any) -> list[Any]:
    return [_number(value) for value in np.asarray(values).tolist()]
