import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DrainMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAIN_MODE_UNSPECIFIED: _ClassVar[DrainMode]
    DRAIN_MODE_WAIT: _ClassVar[DrainMode]
    DRAIN_MODE_PARK: _ClassVar[DrainMode]
    DRAIN_MODE_TWO_PATH: _ClassVar[DrainMode]
DRAIN_MODE_UNSPECIFIED: DrainMode
DRAIN_MODE_WAIT: DrainMode
DRAIN_MODE_PARK: DrainMode
DRAIN_MODE_TWO_PATH: DrainMode

class FoldState(_message.Message):
    __slots__ = ("generation", "adapter_digest", "deployments", "pinned", "reason", "base_fingerprint", "undo_bytes", "reloads", "provenance")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    UNDO_BYTES_FIELD_NUMBER: _ClassVar[int]
    RELOADS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    generation: int
    adapter_digest: str
    deployments: _containers.RepeatedScalarFieldContainer[str]
    pinned: bool
    reason: str
    base_fingerprint: str
    undo_bytes: int
    reloads: int
    provenance: str
    def __init__(self, generation: _Optional[int] = ..., adapter_digest: _Optional[str] = ..., deployments: _Optional[_Iterable[str]] = ..., pinned: _Optional[bool] = ..., reason: _Optional[str] = ..., base_fingerprint: _Optional[str] = ..., undo_bytes: _Optional[int] = ..., reloads: _Optional[int] = ..., provenance: _Optional[str] = ...) -> None: ...

class GetFoldStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetFoldStateResponse(_message.Message):
    __slots__ = ("fold_state", "decision", "transitions", "costs", "queued", "residency", "under_way")
    FOLD_STATE_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    TRANSITIONS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    UNDER_WAY_FIELD_NUMBER: _ClassVar[int]
    fold_state: FoldState
    decision: Decision
    transitions: _containers.RepeatedCompositeFieldContainer[Transition]
    costs: Costs
    queued: _containers.RepeatedCompositeFieldContainer[QueuedRows]
    residency: Residency
    under_way: str
    def __init__(self, fold_state: _Optional[_Union[FoldState, _Mapping]] = ..., decision: _Optional[_Union[Decision, _Mapping]] = ..., transitions: _Optional[_Iterable[_Union[Transition, _Mapping]]] = ..., costs: _Optional[_Union[Costs, _Mapping]] = ..., queued: _Optional[_Iterable[_Union[QueuedRows, _Mapping]]] = ..., residency: _Optional[_Union[Residency, _Mapping]] = ..., under_way: _Optional[str] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("adapter_digest", "cause", "reason")
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    adapter_digest: str
    cause: str
    reason: str
    def __init__(self, adapter_digest: _Optional[str] = ..., cause: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Transition(_message.Message):
    __slots__ = ("time", "generation", "adapter_digest", "reason", "took")
    TIME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TOOK_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    generation: int
    adapter_digest: str
    reason: str
    took: _duration_pb2.Duration
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., generation: _Optional[int] = ..., adapter_digest: _Optional[str] = ..., reason: _Optional[str] = ..., took: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Costs(_message.Message):
    __slots__ = ("fold", "restore", "swap", "steps")
    FOLD_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    SWAP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    fold: _duration_pb2.Duration
    restore: _duration_pb2.Duration
    swap: _duration_pb2.Duration
    steps: _containers.RepeatedCompositeFieldContainer[StepCost]
    def __init__(self, fold: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., restore: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., swap: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[StepCost, _Mapping]]] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("rows", "plain", "two_path")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PLAIN_FIELD_NUMBER: _ClassVar[int]
    TWO_PATH_FIELD_NUMBER: _ClassVar[int]
    rows: int
    plain: _duration_pb2.Duration
    two_path: _duration_pb2.Duration
    def __init__(self, rows: _Optional[int] = ..., plain: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., two_path: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Residency(_message.Message):
    __slots__ = ("known", "on_device", "device_slots", "device_bytes", "device_budget_bytes", "on_host", "host_bytes", "host_budget_bytes", "fetches")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    ON_DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    ON_HOST_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    known: int
    on_device: int
    device_slots: int
    device_bytes: int
    device_budget_bytes: int
    on_host: int
    host_bytes: int
    host_budget_bytes: int
    fetches: int
    def __init__(self, known: _Optional[int] = ..., on_device: _Optional[int] = ..., device_slots: _Optional[int] = ..., device_bytes: _Optional[int] = ..., device_budget_bytes: _Optional[int] = ..., on_host: _Optional[int] = ..., host_bytes: _Optional[int] = ..., host_budget_bytes: _Optional[int] = ..., fetches: _Optional[int] = ...) -> None: ...

class QueuedRows(_message.Message):
    __slots__ = ("adapter_digest", "policy", "running", "waiting", "on_device")
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    ON_DEVICE_FIELD_NUMBER: _ClassVar[int]
    adapter_digest: str
    policy: str
    running: int
    waiting: int
    on_device: bool
    def __init__(self, adapter_digest: _Optional[str] = ..., policy: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., on_device: _Optional[bool] = ...) -> None: ...

class MergeAdapterRequest(_message.Message):
    __slots__ = ("deployment", "drain", "drain_timeout")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    drain: DrainMode
    drain_timeout: _duration_pb2.Duration
    def __init__(self, deployment: _Optional[str] = ..., drain: _Optional[_Union[DrainMode, str]] = ..., drain_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class MergeAdapterResponse(_message.Message):
    __slots__ = ("fold_state", "fold_time", "weight_bytes", "drain", "delta_error")
    FOLD_STATE_FIELD_NUMBER: _ClassVar[int]
    FOLD_TIME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    DELTA_ERROR_FIELD_NUMBER: _ClassVar[int]
    fold_state: FoldState
    fold_time: _duration_pb2.Duration
    weight_bytes: int
    drain: DrainReport
    delta_error: float
    def __init__(self, fold_state: _Optional[_Union[FoldState, _Mapping]] = ..., fold_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., weight_bytes: _Optional[int] = ..., drain: _Optional[_Union[DrainReport, _Mapping]] = ..., delta_error: _Optional[float] = ...) -> None: ...

class UnmergeAdapterRequest(_message.Message):
    __slots__ = ("drain", "drain_timeout", "hold")
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    drain: DrainMode
    drain_timeout: _duration_pb2.Duration
    hold: bool
    def __init__(self, drain: _Optional[_Union[DrainMode, str]] = ..., drain_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., hold: _Optional[bool] = ...) -> None: ...

class UnmergeAdapterResponse(_message.Message):
    __slots__ = ("fold_state", "restore_time", "drain")
    FOLD_STATE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_TIME_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    fold_state: FoldState
    restore_time: _duration_pb2.Duration
    drain: DrainReport
    def __init__(self, fold_state: _Optional[_Union[FoldState, _Mapping]] = ..., restore_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., drain: _Optional[_Union[DrainReport, _Mapping]] = ...) -> None: ...

class DrainReport(_message.Message):
    __slots__ = ("drained", "parked", "two_path", "took")
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    TWO_PATH_FIELD_NUMBER: _ClassVar[int]
    TOOK_FIELD_NUMBER: _ClassVar[int]
    drained: int
    parked: int
    two_path: int
    took: _duration_pb2.Duration
    def __init__(self, drained: _Optional[int] = ..., parked: _Optional[int] = ..., two_path: _Optional[int] = ..., took: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ReleaseFoldStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseFoldStateResponse(_message.Message):
    __slots__ = ("fold_state",)
    FOLD_STATE_FIELD_NUMBER: _ClassVar[int]
    fold_state: FoldState
    def __init__(self, fold_state: _Optional[_Union[FoldState, _Mapping]] = ...) -> None: ...

class VerifyBaseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyBaseResponse(_message.Message):
    __slots__ = ("restored", "tensors_checked", "mismatched", "base_fingerprint")
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    TENSORS_CHECKED_FIELD_NUMBER: _ClassVar[int]
    MISMATCHED_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    restored: bool
    tensors_checked: int
    mismatched: _containers.RepeatedScalarFieldContainer[str]
    base_fingerprint: str
    def __init__(self, restored: _Optional[bool] = ..., tensors_checked: _Optional[int] = ..., mismatched: _Optional[_Iterable[str]] = ..., base_fingerprint: _Optional[str] = ...) -> None: ...

class ExportMergedRequest(_message.Message):
    __slots__ = ("deployment", "path", "max_shard_bytes")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    MAX_SHARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    path: str
    max_shard_bytes: int
    def __init__(self, deployment: _Optional[str] = ..., path: _Optional[str] = ..., max_shard_bytes: _Optional[int] = ...) -> None: ...

class ExportMergedResponse(_message.Message):
    __slots__ = ("progress", "exported")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    EXPORTED_FIELD_NUMBER: _ClassVar[int]
    progress: ExportProgress
    exported: ExportSummary
    def __init__(self, progress: _Optional[_Union[ExportProgress, _Mapping]] = ..., exported: _Optional[_Union[ExportSummary, _Mapping]] = ...) -> None: ...

class ExportProgress(_message.Message):
    __slots__ = ("tensors_done", "tensors_total", "bytes_done", "bytes_total")
    TENSORS_DONE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int
    def __init__(self, tensors_done: _Optional[int] = ..., tensors_total: _Optional[int] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ...) -> None: ...

class ExportSummary(_message.Message):
    __slots__ = ("path", "files", "tensors", "bytes", "adapter_digest", "base_fingerprint", "delta_error")
    PATH_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DELTA_ERROR_FIELD_NUMBER: _ClassVar[int]
    path: str
    files: _containers.RepeatedScalarFieldContainer[str]
    tensors: int
    bytes: int
    adapter_digest: str
    base_fingerprint: str
    delta_error: float
    def __init__(self, path: _Optional[str] = ..., files: _Optional[_Iterable[str]] = ..., tensors: _Optional[int] = ..., bytes: _Optional[int] = ..., adapter_digest: _Optional[str] = ..., base_fingerprint: _Optional[str] = ..., delta_error: _Optional[float] = ...) -> None: ...

class MeasureOverheadRequest(_message.Message):
    __slots__ = ("batches", "adapters", "ranks", "contexts", "precision", "max_pairs")
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    MAX_PAIRS_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedScalarFieldContainer[int]
    adapters: _containers.RepeatedScalarFieldContainer[int]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    contexts: _containers.RepeatedScalarFieldContainer[int]
    precision: float
    max_pairs: int
    def __init__(self, batches: _Optional[_Iterable[int]] = ..., adapters: _Optional[_Iterable[int]] = ..., ranks: _Optional[_Iterable[int]] = ..., contexts: _Optional[_Iterable[int]] = ..., precision: _Optional[float] = ..., max_pairs: _Optional[int] = ...) -> None: ...

class MeasureOverheadResponse(_message.Message):
    __slots__ = ("progress", "overhead", "refusal")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    OVERHEAD_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    progress: OverheadProgress
    overhead: Overhead
    refusal: OverheadRefusal
    def __init__(self, progress: _Optional[_Union[OverheadProgress, _Mapping]] = ..., overhead: _Optional[_Union[Overhead, _Mapping]] = ..., refusal: _Optional[_Union[OverheadRefusal, _Mapping]] = ...) -> None: ...

class OverheadCell(_message.Message):
    __slots__ = ("batch", "adapters", "rank", "context")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    batch: int
    adapters: int
    rank: int
    context: int
    def __init__(self, batch: _Optional[int] = ..., adapters: _Optional[int] = ..., rank: _Optional[int] = ..., context: _Optional[int] = ...) -> None: ...

class OverheadProgress(_message.Message):
    __slots__ = ("cell", "cells_done", "cells_total", "pairs")
    CELL_FIELD_NUMBER: _ClassVar[int]
    CELLS_DONE_FIELD_NUMBER: _ClassVar[int]
    CELLS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    cell: OverheadCell
    cells_done: int
    cells_total: int
    pairs: int
    def __init__(self, cell: _Optional[_Union[OverheadCell, _Mapping]] = ..., cells_done: _Optional[int] = ..., cells_total: _Optional[int] = ..., pairs: _Optional[int] = ...) -> None: ...

class OverheadRefusal(_message.Message):
    __slots__ = ("cell", "reason")
    CELL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    cell: OverheadCell
    reason: str
    def __init__(self, cell: _Optional[_Union[OverheadCell, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class Overhead(_message.Message):
    __slots__ = ("cell", "pairs", "ratio", "low", "high", "plain_step", "unmerged_step", "measured_at")
    CELL_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    PLAIN_STEP_FIELD_NUMBER: _ClassVar[int]
    UNMERGED_STEP_FIELD_NUMBER: _ClassVar[int]
    MEASURED_AT_FIELD_NUMBER: _ClassVar[int]
    cell: OverheadCell
    pairs: int
    ratio: float
    low: float
    high: float
    plain_step: _duration_pb2.Duration
    unmerged_step: _duration_pb2.Duration
    measured_at: _timestamp_pb2.Timestamp
    def __init__(self, cell: _Optional[_Union[OverheadCell, _Mapping]] = ..., pairs: _Optional[int] = ..., ratio: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., plain_step: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., unmerged_step: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., measured_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListOverheadsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListOverheadsResponse(_message.Message):
    __slots__ = ("overheads",)
    OVERHEADS_FIELD_NUMBER: _ClassVar[int]
    overheads: _containers.RepeatedCompositeFieldContainer[Overhead]
    def __init__(self, overheads: _Optional[_Iterable[_Union[Overhead, _Mapping]]] = ...) -> None: ...
