"""/v1/fine_tuning/jobs: create, look at, cancel, pause and resume fine-tuning jobs."""

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request

from cluster.registry.tables import Job, JobCheckpoint, JobEvent
from serving import pages, problems
from serving.access import Tune
from serving.job_book import JobBook
from serving.pages import After
from serving.problems import ApiError
from serving.tuning_schema import (
    CheckpointList,
    CheckpointObject,
    CreateJob,
    EventList,
    EventObject,
    JobList,
    JobObject,
)

PATH = "/v1/fine_tuning/jobs"
_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)
_MAX_VALUE_CHARS = 512
_MAX_METADATA = 16


def router(book: JobBook | None, *, organization: str = "") -> APIRouter:
    """The routes. book: None where tuning is off; the routes then answer 404 and say so."""
    routes = APIRouter(prefix=PATH)

    def opened() -> JobBook:
        if book is None:
            message = "Fine-tuning is off on this server; its operator turns it on by `tuning:`."
            raise ApiError(message, status=404, code="unknown_url")
        return book

    @routes.post("", response_model=JobObject)
    async def create_job(
        body: CreateJob,
        caller: Tune,
        idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    ) -> Any:
        """Fine-tune a model on an uploaded file. The same request twice makes one job."""
        job = await asyncio.to_thread(
            opened().create, body, caller, idempotency_key=idempotency_key
        )
        return described(job, organization)

    @routes.get("", response_model=JobList)
    async def list_jobs(
        request: Request,
        caller: Tune,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Any:
        """Your project's jobs, the newest first. `metadata[k]=v` and `metadata=null` choose."""
        wanted, without = _metadata(request)
        page = await asyncio.to_thread(
            opened().list_,
            caller.project,
            after=after,
            limit=limit,
            metadata=wanted,
            without_metadata=without,
        )
        rows = [described(job, organization) for job in page.rows]
        return {"object": "list", "data": rows, "has_more": page.has_more}

    @routes.get("/{job_id}", response_model=JobObject)
    async def retrieve_job(job_id: str, caller: Tune) -> Any:
        """One job."""
        job = await asyncio.to_thread(opened().get, caller.project, _checked(job_id))
        return described(job, organization)

    @routes.post("/{job_id}/cancel", response_model=JobObject)
    async def cancel_job(job_id: str, caller: Tune) -> Any:
        """End a job for good."""
        job = await asyncio.to_thread(opened().cancel, caller.project, _checked(job_id))
        return described(job, organization)

    @routes.post("/{job_id}/pause", response_model=JobObject)
    async def pause_job(job_id: str, caller: Tune) -> Any:
        """Save a checkpoint and free the device."""
        job = await asyncio.to_thread(opened().pause, caller.project, _checked(job_id))
        return described(job, organization)

    @routes.post("/{job_id}/resume", response_model=JobObject)
    async def resume_job(job_id: str, caller: Tune) -> Any:
        """Go on where a paused job was."""
        job = await asyncio.to_thread(opened().resume, caller.project, _checked(job_id))
        return described(job, organization)

    @routes.get("/{job_id}/events", response_model=EventList)
    async def list_events(
        job_id: str,
        caller: Tune,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    ) -> Any:
        """What has happened, the newest first."""
        page = await asyncio.to_thread(
            opened().events, caller.project, _checked(job_id), after=after, limit=limit
        )
        rows = [described_event(event) for event in page.rows]
        return {"object": "list", "data": rows, "has_more": page.has_more}

    @routes.get("/{job_id}/checkpoints", response_model=CheckpointList)
    async def list_checkpoints(
        job_id: str,
        caller: Tune,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 10,
    ) -> Any:
        """The models that a job has made on its way, the newest first."""
        page = await asyncio.to_thread(
            opened().checkpoints, caller.project, _checked(job_id), after=after, limit=limit
        )
        rows = [described_checkpoint(one) for one in page.rows]
        return pages.listed(rows, has_more=page.has_more)

    return routes


def described(job: Job, organization: str) -> JobObject:
    """A job as clients see it."""
    method: dict[str, Any] = job.method
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "model": job.model,
        "organization_id": f"org-{organization}",
        "status": job.status,  # pyright: ignore[reportReturnType]
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "hyperparameters": method[method["type"]]["hyperparameters"],
        "method": method,
        "seed": job.seed,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens,
        "fine_tuned_model": job.fine_tuned_model,
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "estimated_finish": None if job.estimated_finish is None else int(job.estimated_finish),
        "error": job.error,  # pyright: ignore[reportReturnType]
        "integrations": [],
        "metadata": job.labels,
        "user_provided_suffix": job.suffix,
        "lora": {**job.request["lora"], **_of_winner(job, "lora.")},
        "search": _search(job),
    }


def _search(job: Job) -> dict[str, Any] | None:
    asked = job.request.get("search")
    return None if asked is None else {**asked, "winner": job.winner}


def _of_winner(job: Job, section: str) -> dict[str, Any]:
    """The winner's settings of a section, by field."""
    params: dict[str, Any] = (job.winner or {}).get("params", {})
    return {
        path.removeprefix(section): value
        for path, value in params.items()
        if path.startswith(section)
    }


def described_event(event: JobEvent) -> EventObject:
    """A line of a job's story as clients see it."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,  # pyright: ignore[reportReturnType]
        "message": event.message,
        "type": event.type,  # pyright: ignore[reportReturnType]
        "data": event.data,
    }


def described_checkpoint(one: JobCheckpoint) -> CheckpointObject:
    """A checkpoint as clients see it."""
    return {
        "id": one.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(one.created_at),
        "fine_tuned_model_checkpoint": one.model,
        "fine_tuning_job_id": one.job_id,
        "step_number": one.step,
        "metrics": one.metrics,
    }


def _checked(id: str) -> str:
    if not re.fullmatch(r"ftjob-[0-9a-f]{24}", id):
        raise problems.not_found("fine-tuning job", id)
    return id


def _metadata(request: Request) -> tuple[dict[str, str], bool]:
    """(the pairs that are asked for, whether jobs without any are). Raises ApiError."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        found = _METADATA.fullmatch(name)
        if found is None:
            continue
        if len(value) > _MAX_VALUE_CHARS or "\0" in name + value:
            raise problems.invalid("metadata", f"allowed: up to {_MAX_VALUE_CHARS} characters")
        wanted[found.group(1)] = value
    if len(wanted) > _MAX_METADATA:
        raise problems.invalid("metadata", f"allowed: up to {_MAX_METADATA} pairs")
    return wanted, request.query_params.get("metadata") == "null"
