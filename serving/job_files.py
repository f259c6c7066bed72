"""What is to be said of a job's files before it may run."""

from dataclasses import dataclass
from typing import Literal

from cluster.registry.tables import Job
from serving import finding
from serving.problems import ApiError
from serving.shelf import Shelf

Param = Literal["training_file", "validation_file"]
PARAMS: tuple[Param, ...] = ("training_file", "validation_file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """Why a job ends badly."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usable:
    """A file that a job can use."""

    examples: int
    warning: str | None
    """What may not be meant."""


def examine(shelf: Shelf, job: Job, param: Param, *, min_examples: int) -> Usable | Fate | None:
    """What a job has of a file, or why it cannot use it; None: nobody has looked yet.

    min_examples: of the training file.
    """
    noun, code = param.replace("_", " ").capitalize(), f"invalid_{param}"
    try:
        file = shelf.get(job.project, getattr(job, param))
        if file.status == "uploaded":
            return None
        if file.status == "error":
            return Fate(code=code, message=f"{noun}: {file.status_details}", param=param)
        method = finding.method_of(shelf.path(file))
    except (ApiError, FileNotFoundError):
        message = f"{noun} was deleted before the job could read it."
        return Fate(code=code, message=message, param=param)
    if method != job.method["type"]:
        message = f"{noun} has the lines of method {method}, and the job's is {job.method['type']}"
        return Fate(code=code, message=message, param=param)
    number, least = file.examples or 0, min_examples if param == "training_file" else 1
    if number < least:
        message = f"{noun} has {number} example(s), but must have at least {least} examples"
        return Fate(code="invalid_n_examples", message=message, param=param)
    warning = file.status_details and f"{noun}: {file.status_details}"
    return Usable(examples=number, warning=warning)
