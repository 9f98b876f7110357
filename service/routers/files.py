"""`/v1/files`: input and output files of batches and jobs, in OpenAI's format."""

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from service.errors import InvalidRequest
from service.http.dependencies import JobsDep, JobsOwner
from service.http.error_handlers import request_error
from service.http.file_response import StoredFileResponse
from service.jobs.schemas import FileObject, Page, Purpose, Upload
from service.schemas import Deleted, ErrorResponse

router = APIRouter(prefix="/v1/files", tags=["files"], responses={"4XX": {"model": ErrorResponse}})

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": Upload.model_json_schema(),
                "encoding": {"file": {"contentType": "application/octet-stream"}},
            }
        },
    }
}


@router.post("", openapi_extra=FORM)
async def upload(request: Request, jobs: JobsDep, owner: JobsOwner) -> FileObject:
    """Store a file: `batch` for the lines of a batch, `fine-tune` for the prompts of a distillation job."""
    # The form is read here and not by a parameter, so that the server reads no upload without a valid key.
    async with request.form(max_files=1, max_fields=3) as form:
        if not isinstance(form.get("file"), UploadFile):
            message = "file: upload one in a multipart form, for example by curl -F file=@lines.jsonl -F purpose=batch"
            raise InvalidRequest(message, "file", "invalid_value")
        try:
            given = Upload.model_validate(dict(form))
        except ValidationError as error:
            raise request_error(error, "body") from None
        if (given.anchor is None) != (given.seconds is None):
            raise InvalidRequest("expires_after takes anchor and seconds together", "expires_after")
        kept = await jobs.write(
            jobs.files.add,
            given.file.file,
            owner=owner,
            purpose=given.purpose,
            filename=given.file.filename or "file",
            now=int(time.time()),
            lifetime=given.seconds,
        )
    return FileObject.of(kept)


@router.get("")
def index(
    jobs: JobsDep,
    owner: JobsOwner,
    purpose: Purpose | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """Your files, newest first."""
    found, more = jobs.files.index(owner, purpose, after, order, limit, int(time.time()))
    return Page[FileObject].of([FileObject.of(file) for file in found], more)


@router.get("/{file_id}")
def show(file_id: str, jobs: JobsDep, owner: JobsOwner) -> FileObject:
    """One file."""
    return FileObject.of(jobs.files.get(owner, file_id, int(time.time())))


@router.delete("/{file_id}")
async def remove(file_id: str, jobs: JobsDep, owner: JobsOwner) -> Deleted:
    """Delete a file, unless an unfinished batch or job needs it."""
    await jobs.write(jobs.files.remove, owner, file_id, int(time.time()))
    return Deleted(id=file_id, object="file")


@router.get(
    "/{file_id}/content",
    response_class=StoredFileResponse,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
def content(file_id: str, jobs: JobsDep, owner: JobsOwner) -> StoredFileResponse:
    """The bytes of a file."""
    file = jobs.files.get(owner, file_id, int(time.time()))
    return StoredFileResponse(
        jobs.files.path(file.id),
        media_type="application/octet-stream",
        filename=file.filename,
        headers={"x-content-type-options": "nosniff"},
    )
