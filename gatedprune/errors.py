"""The errors that gatedprune raises: one base class, each also a standard exception."""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "GatedPruneError",
    "ModelError",
]


class GatedPruneError(Exception):
    """Base class of every error raised on purpose by gatedprune."""


class ConfigError(GatedPruneError, ValueError):
    """An argument or option is out of its domain."""


class ModelError(GatedPruneError, ValueError):
    """A model cannot be analysed, gated, compacted or pruned as asked."""


class DataError(GatedPruneError, ValueError):
    """An input tensor, file or data set is not what it should be."""


class CheckpointError(GatedPruneError, RuntimeError):
    """A checkpoint is damaged, or belongs to another model or version."""


class ExportError(GatedPruneError, RuntimeError):
    """A model cannot be written in the format asked for."""


class BackendError(GatedPruneError, RuntimeError):
    """An engine was asked for explicitly and cannot run here."""
