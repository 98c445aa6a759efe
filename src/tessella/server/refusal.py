"""A request that is not answered, in OpenAI's form and with the status that says why.

In: what was wrong.  Out: {"error": {"message", "type", "param", "code"}} and a status.
Messages are sentences of ours with the value, the limit and a way out; text of libraries never goes to a client.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

# Status -> type, as the openai package and its like expect them.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "unavailable_error",
}


class ErrorText(BaseModel):
    """What was wrong, and the way out."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorText


class Refusal(Exception):
    """Ends a request. param: the field that is meant; retry_s: when it may be sent again (408, 429 and 503 only)."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_s: float | None = None
    ):
        super().__init__(message)
        assert status in TYPES, f"no type for the status {status}"
        self.status = status
        self.body = ErrorBody(error=ErrorText(message=message, type=TYPES[status], param=param, code=code))
        self.headers: dict[str, str] = {} if retry_s is None else {"retry-after": str(max(1, round(retry_s)))}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def response(self, extra: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body.model_dump(), self.status, {**self.headers, **(extra or {})})


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route says in the OpenAPI page of the statuses with which it refuses."""
    return {status: {"model": ErrorBody, "description": TYPES[status].replace("_", " ")} for status in statuses}
