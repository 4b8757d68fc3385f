import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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
    __slots__ = ("fold_state",)
    FOLD_STATE_FIELD_NUMBER: _ClassVar[int]
    fold_state: FoldState
    def __init__(self, fold_state: _Optional[_Union[FoldState, _Mapping]] = ...) -> None: ...

class MergeAdapterRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: str
    def __init__(self, deployment: _Optional[str] = ...) -> None: ...

class MergeAdapterResponse(_message.Message):
    __slots__ = ("fold_state", "fold_time", "weight_bytes")
    FOLD_STATE_FIELD_NUMBER: _ClassVar[int]
    FOLD_TIME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    fold_state: FoldState
    fold_time: _duration_pb2.Duration
    weight_bytes: int
    def __init__(self, fold_state: _Optional[_Union[FoldState, _Mapping]] = ..., fold_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., weight_bytes: _Optional[int] = ...) -> None: ...

class UnmergeAdapterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnmergeAdapterResponse(_message.Message):
    __slots__ = ("fold_state", "restore_time")
    FOLD_STATE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_TIME_FIELD_NUMBER: _ClassVar[int]
    fold_state: FoldState
    restore_time: _duration_pb2.Duration
    def __init__(self, fold_state: _Optional[_Union[FoldState, _Mapping]] = ..., restore_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

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
