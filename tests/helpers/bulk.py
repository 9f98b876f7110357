"""Bulk batches with the real client: lines, submission and results."""

import json
import threading

import openai

ENDPOINT = "/v1/images/generations"


def line(custom_id: str, **body) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": {"prompt": "a red circle", **body}}


def submit(client: openai.OpenAI, lines, **options):
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    file = client.files.create(file=("lines.jsonl", text.encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", **options)


def ended(client: openai.OpenAI, batch_id: str, *statuses: str):
    """Wait until the batch has one of the statuses."""
    pause = threading.Event()
    for _ in range(600):
        batch = client.batches.retrieve(batch_id)
        if batch.status in statuses:
            return batch
        pause.wait(0.1)
    raise AssertionError(f"the batch is still {batch.status}: {batch.request_counts}")


def read(client: openai.OpenAI, file_id: str | None) -> dict[str, dict]:
    """Return the lines of an output or error file by custom_id; each occurs once."""
    lines = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found
