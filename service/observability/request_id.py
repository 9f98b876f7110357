"""`new_request_id`: what names one request in its answer, in the log and in its trace."""

import secrets


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"
