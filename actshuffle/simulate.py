"""Simulated runs on a cluster under their earlier import path; see `actshuffle.planning.simulate`."""

from actshuffle.planning.simulate import Played, simulate

__all__ = ["Played", "simulate"]
