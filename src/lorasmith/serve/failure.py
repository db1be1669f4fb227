"""What a client is told when it goes wrong, in the form that the openai package makes its exceptions of."""

from typing import Any

from lorasmith.errors import LorasmithError, ModelError, OutOfMemoryError
from lorasmith.i18n import _
from lorasmith.serve.worker import WorkerStopped

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class Failure(Exception):
    """An answer that is an error. `retry`: seconds after which to try again."""

    def __init__(
        self, status: int, text: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.text, self.param, self.code, self.retry = status, text, param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.text, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After where it helps to try again, how to log in where that is missing."""
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def failure_of(error: Exception) -> Failure:
    """What the client is told of an error from the model's thread."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, WorkerStopped):
        return Failure(503, _("the server shut down before the reply was complete."))
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return Failure(503, str(error) or _("There is not enough memory for this request."), retry=10)
    status = 500 if isinstance(error, ModelError) or not isinstance(error, LorasmithError) else 400
    return Failure(status, str(error) if isinstance(error, LorasmithError) else _("internal server error."))
