"""`/v1/batches`: thousands of image requests from a file, in OpenAI's format."""

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from service.errors import NotFound
from service.http.dependencies import ImagesDep, JobsDep, JobsOwner, SettingsDep
from service.jobs import tables
from service.jobs.batches.archive import zip_images
from service.jobs.schemas import BatchObject, BatchRequest, Page
from service.schemas import ErrorResponse

router = APIRouter(prefix="/v1/batches", tags=["batches"], responses={"4XX": {"model": ErrorResponse}})


@router.post("")
async def create(
    body: BatchRequest, request: Request, settings: SettingsDep, jobs: JobsDep, owner: JobsOwner
) -> BatchObject:
    """Answer the requests of a file within 24 hours, at low priority. Images are links."""
    base = str(settings.http.public_url or request.base_url)
    return _batch_object(await jobs.write(jobs.batches.create, body, owner, base, int(time.time())))


@router.get("")
def index(
    jobs: JobsDep, owner: JobsOwner, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> Page[BatchObject]:
    """Your batches, newest first."""
    found, more = jobs.batches.index(owner, after, limit)
    return Page[BatchObject].of([_batch_object(batch) for batch in found], more)


@router.get("/{batch_id}")
def show(batch_id: str, jobs: JobsDep, owner: JobsOwner) -> BatchObject:
    """One batch, with its counts as they stand."""
    return _batch_object(jobs.batches.get(owner, batch_id))


@router.post("/{batch_id}/cancel")
async def cancel(batch_id: str, jobs: JobsDep, owner: JobsOwner) -> BatchObject:
    """Start no further line; lines that were answered before are in the output file."""
    return _batch_object(await jobs.write(jobs.batches.cancel, owner, batch_id, int(time.time())))


@router.get(
    "/{batch_id}/images",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def images(batch_id: str, jobs: JobsDep, images: ImagesDep, owner: JobsOwner) -> StreamingResponse:
    """All images of a batch that has ended, as a ZIP file (extension)."""
    batch = await asyncio.to_thread(jobs.batches.get, owner, batch_id)
    if batch.output_file_id is None:
        message = f"the batch has no images; its status is {batch.status}"
        raise NotFound(message, "batch_id", "no_images")
    file = await asyncio.to_thread(jobs.files.get, owner, batch.output_file_id, int(time.time()))
    headers = {"content-disposition": f'attachment; filename="{batch_id}.zip"', "x-content-type-options": "nosniff"}
    zipped = zip_images(jobs.files.path(file.id), images.artifacts)
    return StreamingResponse(zipped, media_type="application/zip", headers=headers)


def _batch_object(batch: tables.BatchRow) -> BatchObject:
    tokens = {"input_tokens": batch.input_tokens, "output_tokens": batch.output_tokens}
    return BatchObject.of(
        batch,
        metadata=batch.details,
        errors=None if batch.errors is None else {"data": batch.errors},
        request_counts={"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        usage=tokens | {"total_tokens": batch.input_tokens + batch.output_tokens},
    )
