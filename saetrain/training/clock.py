"""When a run trained and for how long; rates of an interval: tokens a second, MFU, waits for rows, bytes sent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch

from saetrain.compute.ahead import Cursor
from saetrain.compute.mesh import Mesh
from saetrain.config import Config
from saetrain.model import Model
from saetrain.training import metrics


class Clock:
    """The seconds since the last line, without those of evaluations and checkpoints.

    The members of a sweep take turns in each step, so all have the same interval and the same tokens a second.
    """

    def __init__(self, cursor: Cursor, config: Config, mesh: Mesh, before: float = 0.0) -> None:
        """Of a run that has trained for `before` seconds, if it is resumed."""
        self.cursor, self.config, self.mesh, self.device = cursor, config, mesh, mesh.device
        self.began = time.perf_counter() - before
        self.peaks: dict[str, float] = {}
        self.restart(-1)

    def restart(self, at: int) -> None:
        """Begin an interval after step `at`; the first one, after -1, includes warm-up and has no rates."""
        self.at, self.started, self.away = at, time.perf_counter(), 0.0
        self.waited = self.cursor.wait_seconds
        self.sent = self.mesh.sent.copy()

    def now(self) -> dict[str, Any]:
        """The seconds of training until now, those before a stop included but not the stop itself; and the date."""
        date = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"seconds": round(time.perf_counter() - self.began, 3), "time": date}

    @contextmanager
    def read(self, at: int) -> Iterator[None]:
        """Stop the clock after step `at`: inside, `rates` are those of the interval that ends here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        stopped = time.perf_counter()
        self.steps = at - self.at if self.at >= 0 else 0
        self.seconds = max(stopped - self.started - self.away, 1e-9)
        self.sent_now = self.mesh.sent.copy()
        self.waited_now = self.cursor.wait_seconds
        yield
        self.away += time.perf_counter() - stopped

    def rates(self, model: Model, active: float, *, again: bool) -> dict[str, float | None]:
        """The rates for a model with so many active latents a token; "mfu" is None where training beats the product.

        With `again`, the speed of the product is measured again.
        """
        if not self.steps:
            return {}
        rate = self.steps * self.config.batch_size / self.seconds
        flops = rate * metrics.flops_per_token(model.config, model.d_in, active, model.d_out) / model.mesh.world
        share = flops / self._peak(model, again=again)
        tokens = self.steps * self.config.batch_size / self.mesh.dp
        return {
            **{f"sent.{k}": (n - self.sent[k]) / tokens for k, n in self.sent_now.items()},
            "tokens_per_s": rate,
            "mfu": share if share <= 1 else None,
            "loader_wait": (self.waited_now - self.waited) / self.seconds,
        }

    def _peak(self, model: Model, *, again: bool) -> float:
        """Operations a second of the fastest large product so far: other processes may have slowed the earlier ones."""
        name = model.precision
        if again or name not in self.peaks:
            with model.products():
                found = metrics.measure_peak(self.device, model.compute)
            self.peaks[name] = max(self.peaks.get(name, 0.0), found)
        return self.peaks[name]
