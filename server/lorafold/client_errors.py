"""What a client is told of a call that failed. Knows `google.rpc` details, and no call in particular."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2


class ServerError(Exception):
    """The server refused a call, or could not be reached."""

    def __init__(
        self, code: str, message: str, reason: str = "", field: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        """gRPC status, e.g. `NOT_FOUND`."""
        self.reason = reason
        """For programs, e.g. `DEPLOYMENT_NOT_FOUND`; empty if the server did not say."""
        self.field = field
        """The request field that is wrong, if one is."""
        self.retry_after = retry_after
        """Seconds after which the same call may succeed; None if the server did not say."""


@contextmanager
def translated() -> Iterator[None]:
    """Inside, a failed call raises ServerError."""
    try:
        yield
    except grpc.RpcError as error:
        raise server_error(error) from error


def server_error(error: Any) -> ServerError:
    """A failed call as ServerError, with what the server's details say."""
    reason = field_name = ""
    retry_after = None
    for detail in status_details(error):
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            field_name = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    message = error.details() or error.code().name
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not reason:
        message = "the timeout passed before the answer was complete: allow more time or fewer max_tokens; "
        message += "'lorafold status' says who waits, and what for"
    return ServerError(error.code().name, message, reason, field_name, retry_after)


def status_details(error: Any) -> Sequence[Any]:
    """The details of the `google.rpc.Status` of a failed call; none if it has no readable one."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []
