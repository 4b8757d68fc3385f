"""The one table from our errors to gRPC status, with `google.rpc` details. Nobody else knows status codes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lorafold import errors as server
from lorafold_adapters import errors as plugin
from lorafold_adapters.errors import LorafoldError

log = structlog.get_logger(__name__)
DOMAIN = "lorafold"
RETRY_SECONDS = 1
MAX_SENTENCE = 600

# The first class that matches counts: subclasses before their parents.
TABLE: tuple[tuple[type[LorafoldError], grpc.StatusCode, str], ...] = (
    (server.InvalidField, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    (server.DeploymentNotFound, grpc.StatusCode.NOT_FOUND, "DEPLOYMENT_NOT_FOUND"),
    (server.DeploymentExists, grpc.StatusCode.ALREADY_EXISTS, "DEPLOYMENT_EXISTS"),
    (server.DeploymentBusy, grpc.StatusCode.ABORTED, "DEPLOYMENT_BUSY"),
    (server.DeploymentUnservable, grpc.StatusCode.FAILED_PRECONDITION, "DEPLOYMENT_UNSERVABLE"),
    (server.EtagMismatch, grpc.StatusCode.ABORTED, "ETAG_MISMATCH"),
    (server.NothingToRollBack, grpc.StatusCode.FAILED_PRECONDITION, "NOTHING_TO_ROLL_BACK"),
    (server.StateDiskFull, grpc.StatusCode.RESOURCE_EXHAUSTED, "STATE_DISK_FULL"),
    # Not UNAVAILABLE: only an operator can change that, so that clients should not try again by themselves.
    (server.StateNotSaved, grpc.StatusCode.FAILED_PRECONDITION, "STATE_NOT_SAVED"),
    (server.QueueFull, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (server.KvFull, grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_FULL"),
    (server.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (server.FoldInProgress, grpc.StatusCode.ABORTED, "FOLD_IN_PROGRESS"),
    (server.MeasurementBusy, grpc.StatusCode.ABORTED, "MEASUREMENT_IN_PROGRESS"),
    (server.ExportOff, grpc.StatusCode.FAILED_PRECONDITION, "EXPORT_FOLDER_UNSET"),
    (server.EngineStopped, grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    (server.BaseReloading, grpc.StatusCode.UNAVAILABLE, "BASE_RELOADING"),
    (server.StepFailed, grpc.StatusCode.INTERNAL, "STEP_FAILED"),
    (plugin.DeviceFull, grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_FULL"),
    (plugin.AdapterNotFound, grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"),
    (plugin.AdapterChanged, grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_CHANGED"),
    (plugin.AdapterCorrupt, grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_CORRUPT"),
    (plugin.AdapterUnsupported, grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_UNSUPPORTED"),
    (plugin.BaseMismatch, grpc.StatusCode.FAILED_PRECONDITION, "BASE_MISMATCH"),
    (plugin.AdapterUnstamped, grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_UNSTAMPED"),
    (plugin.DeltaLost, grpc.StatusCode.FAILED_PRECONDITION, "DELTA_LOST"),
    (plugin.AdapterNotLoaded, grpc.StatusCode.ABORTED, "ADAPTER_GONE"),
    (plugin.AdapterInUse, grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE"),
    (plugin.ExportExists, grpc.StatusCode.ALREADY_EXISTS, "EXPORT_EXISTS"),
    (plugin.ExportFailed, grpc.StatusCode.INTERNAL, "EXPORT_FAILED"),
    (plugin.ExportUnsupported, grpc.StatusCode.FAILED_PRECONDITION, "EXPORT_UNSUPPORTED"),
    (plugin.FoldFailed, grpc.StatusCode.INTERNAL, "FOLD_FAILED"),
    (plugin.BaseCorrupt, grpc.StatusCode.DATA_LOSS, "BASE_CORRUPT"),
)
RETRIABLE = {"QUEUE_FULL", "DEPLOYMENT_BUSY", "FOLD_IN_PROGRESS", "DRAINING", "ADAPTER_GONE", "BASE_RELOADING"}


def code_and_reason(error: LorafoldError) -> tuple[grpc.StatusCode, str]:
    """The status code of an error, and the reason a program can read."""
    for kind, code, reason in TABLE:
        if isinstance(error, kind):
            return code, reason
    return grpc.StatusCode.INTERNAL, "INTERNAL"


def status_of(error: LorafoldError) -> status_pb2.Status:
    """The error as `google.rpc.Status`: its sentence, ErrorInfo, and BadRequest or RetryInfo where they fit."""
    code, reason = code_and_reason(error)
    sentence = shortened(str(error))
    details = [packed(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))]
    if isinstance(error, server.InvalidField):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=sentence)
        details.append(packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if reason in RETRIABLE:
        details.append(packed(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_SECONDS))))
    return status_pb2.Status(code=code.value[0], message=sentence, details=details)


def shortened(sentence: str) -> str:
    """At most `MAX_SENTENCE` characters: status travels in headers, which a quoted input could overflow."""
    return sentence if len(sentence) <= MAX_SENTENCE else f"{sentence[: MAX_SENTENCE - 4]} ..."


def packed(message: Any) -> AnyMessage:
    """A message in an Any."""
    detail = AnyMessage()
    detail.Pack(message)
    return detail


@asynccontextmanager
async def translated(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Inside, our errors end the call with their own status, and anything else with INTERNAL and a log line."""
    try:
        yield
    except LorafoldError as error:
        await refuse(context, error)
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        log.error("call failed", exc_info=True)
        await refuse(context, LorafoldError(f"internal error ({type(error).__name__}): see the server's log"))


async def refuse(context: grpc.aio.ServicerContext[Any, Any], error: LorafoldError) -> NoReturn:
    """Ends the call with the error's status."""
    status = rpc_status.to_status(status_of(error))
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(status.code, status.details)
    raise AssertionError("abort returns never")
