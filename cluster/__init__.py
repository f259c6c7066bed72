"""Ground floor: configuration, errors, storage, the Ray session and its jobs."""

__version__ = "0.1.0"
