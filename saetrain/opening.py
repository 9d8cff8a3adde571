"""`load`: a finished autoencoder from a folder of ours or of another tool."""

from __future__ import annotations

from pathlib import Path

from saetrain.foreign import read_foreign
from saetrain.sae import SAE, Folded
from saetrain.training.checkpoint import find


def load(path: str | Path) -> SAE:
    """The autoencoder of a run or checkpoint, or of a folder that SAELens or sparsify wrote."""
    path = Path(path)
    return read_foreign(path) if (path / "cfg.json").exists() else Folded(find(path)).whole()
