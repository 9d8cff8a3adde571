"""When runs trained and for how long, from the dates and seconds in their own lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from actshuffle.units import format_seconds
from saetrain.reporting.panels import is_number

PAUSE = 60.0  # the shortest pause, in seconds, that the report mentions


@dataclass(frozen=True)
class When:
    """The first and the last moment of a run, and its seconds of training."""

    began: datetime
    ended: datetime
    seconds: float

    def span(self) -> str:
        """Both moments in UTC, to the minute; one date if they share it."""
        if f"{self.began:%Y-%m-%d %H:%M}" == f"{self.ended:%Y-%m-%d %H:%M}":
            return f"{_date(self.began)}, {self.began:%H:%M} UTC"
        end = (
            f"{self.ended:%H:%M}"
            if self.began.date() == self.ended.date()
            else f"{_date(self.ended)}, {self.ended:%H:%M}"
        )
        return f"{_date(self.began)}, {self.began:%H:%M} to {end} UTC"

    def length(self) -> str:
        """How long it trained, and whether it stood still in between."""
        away = (self.ended - self.began).total_seconds() - self.seconds
        paused = f", with pauses of {format_seconds(away)}" if away > max(PAUSE, 0.05 * self.seconds) else ""
        return format_seconds(self.seconds) + paused


def when(lines: Sequence[Mapping[str, Any]]) -> When | None:
    """From the lines of a log; None for runs of versions that kept no dates."""
    dated = [
        (date, float(x["seconds"])) for x in lines if is_number(x.get("seconds")) and (date := _read(x.get("time")))
    ]
    if not dated:
        return None
    (first, before), (last, seconds) = dated[0], dated[-1]
    return When(first - timedelta(seconds=before), last, seconds)


def whole(found: Sequence[When]) -> When | None:
    """From the first begin to the last end of several, with the seconds of the longest; of a sweep all are the same."""
    if not found:
        return None
    return When(min(w.began for w in found), max(w.ended for w in found), max(w.seconds for w in found))


def _read(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC)
    except ValueError:
        return None


def _date(moment: datetime) -> str:
    return f"{moment.day} {moment:%B %Y}"
