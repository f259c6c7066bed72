"""Ground floor: configuration, errors, storage, the Ray session and its jobs."""
