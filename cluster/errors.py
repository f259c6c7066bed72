"""The one error tree.

Each error inherits its standard-library kin, so `except ValueError` keeps working; carries a
stable `code` and an HTTP `status`; takes one message, so it survives pickling between processes.
A message says what, where, what was given, what is allowed, and what to do next.
"""

from typing import ClassVar


class LorayError(Exception):
    """Something the user can act on. Everything else that is raised is a bug."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500


class ConfigError(LorayError, ValueError):
    """A recipe, an override or a combination of settings that cannot be used."""

    code = "invalid_config"
    status = 400


class DataError(LorayError, ValueError):
    """Training or evaluation data that cannot be used."""

    code = "invalid_training_file"
    status = 400


class ModelError(LorayError, ValueError):
    """A base model that cannot be loaded or trained as asked."""

    code = "invalid_model"
    status = 400


class AdapterError(LorayError, ValueError):
    """An adapter that is missing, damaged, empty or made for another base."""

    code = "invalid_adapter"
    status = 400


class ResourceError(LorayError, RuntimeError):
    """Not enough memory, disk, CPUs or GPUs for what was asked."""

    code = "insufficient_resources"
    status = 507


class StorageError(LorayError, OSError):
    """Reading or writing storage failed, or what was read is not what was written."""

    code = "storage_error"
    status = 500


class RegistryError(LorayError, OSError):
    """The registry's database cannot be reached, is damaged, or is of another version."""

    code = "registry_unavailable"
    status = 503


class FencedError(LorayError, PermissionError):
    """An attempt of a run that a newer one has superseded wants to write: it should just end."""

    code = "attempt_superseded"
    status = 409


def superseded(what: str) -> FencedError:
    """The error of an attempt that must not write any more; `what` says what it did not do."""
    return FencedError(
        f"{what}: this attempt has been superseded by a newer attempt of the same run, which goes "
        "on in its place. Nothing to do here"
    )


class RunInUseError(LorayError, RuntimeError):
    """The run directory belongs to another run that is still alive."""

    code = "run_in_use"
    status = 409


class TrainingError(LorayError, ArithmeticError):
    """Training cannot go on: a loss or gradient is not finite, or a layer does not learn."""

    code = "training_failed"
    status = 500


class ClusterError(LorayError, ConnectionError):
    """Ray cannot be reached, or refused the work."""

    code = "cluster_unavailable"
    status = 503
