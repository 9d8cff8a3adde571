"""Statistics of how well an order mixes, under their earlier import path; see `actshuffle.ordering.mixing`."""

from actshuffle.ordering.mixing import MixingAccumulator, MixingReport, MixingTest, report

__all__ = ["MixingAccumulator", "MixingReport", "MixingTest", "report"]
