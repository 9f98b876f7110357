"""`/v1/fine_tuning`: distillation jobs, in OpenAI's format."""

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from service.errors import InvalidRequest
from service.http.dependencies import JobsDep, JobsOwner, SettingsDep
from service.http.file_response import StoredFileResponse
from service.jobs import tables
from service.jobs.fine_tuning.choices import job_choices
from service.jobs.fine_tuning.options import DistillationOptions
from service.jobs.jobs import Jobs
from service.jobs.schemas import JobCheckpointObject, JobChoices, JobEventObject, JobObject, JobRequest, Page
from service.schemas import Deleted, ErrorResponse

router = APIRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"], responses={"4XX": {"model": ErrorResponse}})

NOSNIFF = {"x-content-type-options": "nosniff"}
REPORT_POLICY = {"content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"}

Limit = Annotated[int, Query(ge=1, le=100)]


@router.get("/choices")
def choices(settings: SettingsDep, jobs: JobsDep, owner: JobsOwner) -> JobChoices:
    """Teachers, presets and methods that a job is chosen from, and limits of its budget (extension)."""
    return job_choices(settings)


@router.post("/jobs")
async def create(body: JobRequest, jobs: JobsDep, owner: JobsOwner) -> JobObject:
    """Distill a teacher into a one-step student, which is served after the job has succeeded."""
    return _job_object(jobs, await jobs.write(jobs.fine_tuning.create, owner, body, _options_of(body)))


def _metadata(request: Request) -> dict[str, str]:
    """Return the pairs of `metadata[key]=value` in the query."""
    given = request.query_params
    return {key[len("metadata[") : -1]: given[key] for key in given if key.startswith("metadata[") and key[-1] == "]"}


@router.get("/jobs")
def index(
    jobs: JobsDep,
    owner: JobsOwner,
    metadata: Annotated[dict[str, str], Depends(_metadata)],
    after: str | None = None,
    limit: Limit = 20,
) -> Page[JobObject]:
    """Your jobs, newest first; `metadata[key]=value` filters them."""
    found, more = jobs.fine_tuning.index(owner, after, limit, metadata)
    return Page[JobObject].of([_job_object(jobs, job) for job in found], more)


@router.get("/jobs/{job_id}")
def show(job_id: str, jobs: JobsDep, owner: JobsOwner) -> JobObject:
    """One job."""
    return _job_object(jobs, jobs.fine_tuning.get(owner, job_id))


@router.post("/jobs/{job_id}/cancel")
async def cancel(job_id: str, jobs: JobsDep, owner: JobsOwner) -> JobObject:
    """Cancel a job. A running one is cancelled when its process has ended."""
    return _job_object(jobs, await jobs.write(jobs.fine_tuning.cancel, owner, job_id))


@router.post("/jobs/{job_id}/pause")
async def pause(job_id: str, jobs: JobsDep, owner: JobsOwner) -> JobObject:
    """Pause a job. A running one is paused when its process has written a checkpoint."""
    return _job_object(jobs, await jobs.write(jobs.fine_tuning.pause, owner, job_id))


@router.post("/jobs/{job_id}/resume")
async def resume(job_id: str, jobs: JobsDep, owner: JobsOwner) -> JobObject:
    """Resume a paused job from its checkpoint."""
    return _job_object(jobs, await jobs.write(jobs.fine_tuning.resume, owner, job_id))


@router.get("/jobs/{job_id}/events")
def events(
    job_id: str, jobs: JobsDep, owner: JobsOwner, after: str | None = None, limit: Limit = 20
) -> Page[JobEventObject]:
    """The events of a job, newest first."""
    found, more = jobs.fine_tuning.events(owner, job_id, after, limit)
    return Page[JobEventObject].of([JobEventObject.of(each) for each in found], more)


@router.get("/jobs/{job_id}/checkpoints")
def checkpoints(
    job_id: str, jobs: JobsDep, owner: JobsOwner, after: str | None = None, limit: Limit = 10
) -> Page[JobCheckpointObject]:
    """The checkpoints of a job, newest first."""
    found, more = jobs.fine_tuning.checkpoints(owner, job_id, after, limit)
    return Page[JobCheckpointObject].of([_checkpoint_object(each) for each in found], more)


@router.delete("/jobs/{job_id}")
async def delete(job_id: str, jobs: JobsDep, owner: JobsOwner) -> Deleted:
    """Delete a job that has ended, with its student, metrics, log and samples (extension)."""
    await jobs.write(jobs.fine_tuning.delete, owner, job_id, int(time.time()))
    return Deleted(id=job_id, object="fine_tuning.job")


@router.get("/jobs/{job_id}/log", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def log(job_id: str, jobs: JobsDep, owner: JobsOwner) -> Response:
    """What the processes of a job have printed (extension)."""
    return Response(jobs.fine_tuning.log(owner, job_id), media_type="text/plain", headers=NOSNIFF)


@router.get("/jobs/{job_id}/report", response_class=Response, responses={200: {"content": {"text/html": {}}}})
def report(job_id: str, jobs: JobsDep, owner: JobsOwner) -> Response:
    """The report of a job: one page with curves, samples and settings (extension)."""
    return Response(jobs.fine_tuning.report(owner, job_id), media_type="text/html", headers=NOSNIFF | REPORT_POLICY)


@router.get("/jobs/{job_id}/sample", response_class=StoredFileResponse, responses={200: {"content": {"image/png": {}}}})
def sample(job_id: str, jobs: JobsDep, owner: JobsOwner) -> StoredFileResponse:
    """The newest grid of the student's images, always of the same prompts and seeds (extension)."""
    return StoredFileResponse(jobs.fine_tuning.sample(owner, job_id), media_type="image/png")


def _options_of(body: JobRequest) -> DistillationOptions:
    """Return the options from the place where they are given. Raises InvalidRequest if that is two places."""
    within = body.method.distillation if body.method else None
    if body.distillation and within:
        raise InvalidRequest("distillation and method.distillation are both given; give one", "distillation")
    options = body.distillation or within or DistillationOptions()
    supervised = body.method.supervised.hyperparameters if body.method and body.method.supervised else None
    if body.hyperparameters and supervised:
        message = "hyperparameters and method.supervised.hyperparameters are both given; give one"
        raise InvalidRequest(message, "hyperparameters")
    given = body.hyperparameters or supervised
    if given is None or given.batch_size is None:
        return options
    if options.batch is not None:
        raise InvalidRequest("batch_size and distillation.batch are both given; give one", "batch_size")
    return options.model_copy(update={"batch": given.batch_size})


def _job_object(jobs: Jobs, job: tables.JobRow) -> JobObject:
    return JobObject.of(
        job,
        name=job.student,
        phase=jobs.fine_tuning.phase(job),
        fine_tuned_model=job.fine_tuned_model if job.status == "succeeded" and job.deleted_at is None else None,
        metadata=job.details,
        method={"distillation": job.distillation},
        organization_id=job.owner,
    )


def _checkpoint_object(row: tables.JobCheckpointRow) -> JobCheckpointObject:
    return JobCheckpointObject.of(row, fine_tuned_model_checkpoint=row.model, fine_tuning_job_id=row.job_id)
