import datetime

from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CompositionMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPOSITION_METHOD_UNSPECIFIED: _ClassVar[CompositionMethod]
    COMPOSITION_METHOD_LINEAR: _ClassVar[CompositionMethod]
    COMPOSITION_METHOD_TIES: _ClassVar[CompositionMethod]
    COMPOSITION_METHOD_DARE_LINEAR: _ClassVar[CompositionMethod]
    COMPOSITION_METHOD_DARE_TIES: _ClassVar[CompositionMethod]
    COMPOSITION_METHOD_MAGNITUDE_PRUNE: _ClassVar[CompositionMethod]
    COMPOSITION_METHOD_SVD: _ClassVar[CompositionMethod]

class BaseMatch(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BASE_MATCH_UNSPECIFIED: _ClassVar[BaseMatch]
    BASE_MATCH_SAME: _ClassVar[BaseMatch]
    BASE_MATCH_OTHER_DTYPE: _ClassVar[BaseMatch]
    BASE_MATCH_UNSTAMPED: _ClassVar[BaseMatch]

class Policy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_UNSPECIFIED: _ClassVar[Policy]
    POLICY_MERGED: _ClassVar[Policy]
    POLICY_UNMERGED: _ClassVar[Policy]
    POLICY_AUTO: _ClassVar[Policy]

class UpdateStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_STAGE_UNSPECIFIED: _ClassVar[UpdateStage]
    UPDATE_STAGE_READ: _ClassVar[UpdateStage]
    UPDATE_STAGE_BOUND: _ClassVar[UpdateStage]
    UPDATE_STAGE_MEASURED: _ClassVar[UpdateStage]
    UPDATE_STAGE_STAGED: _ClassVar[UpdateStage]
    UPDATE_STAGE_SAVED: _ClassVar[UpdateStage]
    UPDATE_STAGE_SWITCHED: _ClassVar[UpdateStage]
    UPDATE_STAGE_DRAINING: _ClassVar[UpdateStage]
COMPOSITION_METHOD_UNSPECIFIED: CompositionMethod
COMPOSITION_METHOD_LINEAR: CompositionMethod
COMPOSITION_METHOD_TIES: CompositionMethod
COMPOSITION_METHOD_DARE_LINEAR: CompositionMethod
COMPOSITION_METHOD_DARE_TIES: CompositionMethod
COMPOSITION_METHOD_MAGNITUDE_PRUNE: CompositionMethod
COMPOSITION_METHOD_SVD: CompositionMethod
BASE_MATCH_UNSPECIFIED: BaseMatch
BASE_MATCH_SAME: BaseMatch
BASE_MATCH_OTHER_DTYPE: BaseMatch
BASE_MATCH_UNSTAMPED: BaseMatch
POLICY_UNSPECIFIED: Policy
POLICY_MERGED: Policy
POLICY_UNMERGED: Policy
POLICY_AUTO: Policy
UPDATE_STAGE_UNSPECIFIED: UpdateStage
UPDATE_STAGE_READ: UpdateStage
UPDATE_STAGE_BOUND: UpdateStage
UPDATE_STAGE_MEASURED: UpdateStage
UPDATE_STAGE_STAGED: UpdateStage
UPDATE_STAGE_SAVED: UpdateStage
UPDATE_STAGE_SWITCHED: UpdateStage
UPDATE_STAGE_DRAINING: UpdateStage

class Deployment(_message.Message):
    __slots__ = ("name", "adapter_path", "policy", "adapter_digest", "adapter_kind", "bound_modules", "adapter_modules", "etag", "create_time", "update_time", "base_match", "fidelity", "fold_refusal", "route_refusal", "composition", "unmerged_error", "not_served", "previous", "priority", "max_concurrency", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PATH_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_KIND_FIELD_NUMBER: _ClassVar[int]
    BOUND_MODULES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_MODULES_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    BASE_MATCH_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    FOLD_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ROUTE_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    COMPOSITION_FIELD_NUMBER: _ClassVar[int]
    UNMERGED_ERROR_FIELD_NUMBER: _ClassVar[int]
    NOT_SERVED_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    adapter_path: str
    policy: Policy
    adapter_digest: str
    adapter_kind: str
    bound_modules: int
    adapter_modules: int
    etag: str
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    base_match: BaseMatch
    fidelity: Fidelity
    fold_refusal: str
    route_refusal: str
    composition: Composition
    unmerged_error: float
    not_served: str
    previous: PreviousVersion
    priority: int
    max_concurrency: int
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., adapter_path: _Optional[str] = ..., policy: _Optional[_Union[Policy, str]] = ..., adapter_digest: _Optional[str] = ..., adapter_kind: _Optional[str] = ..., bound_modules: _Optional[int] = ..., adapter_modules: _Optional[int] = ..., etag: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., base_match: _Optional[_Union[BaseMatch, str]] = ..., fidelity: _Optional[_Union[Fidelity, _Mapping]] = ..., fold_refusal: _Optional[str] = ..., route_refusal: _Optional[str] = ..., composition: _Optional[_Union[Composition, _Mapping]] = ..., unmerged_error: _Optional[float] = ..., not_served: _Optional[str] = ..., previous: _Optional[_Union[PreviousVersion, _Mapping]] = ..., priority: _Optional[int] = ..., max_concurrency: _Optional[int] = ..., pinned: _Optional[bool] = ...) -> None: ...

class PreviousVersion(_message.Message):
    __slots__ = ("adapter_path", "composition", "policy", "adapter_digest")
    ADAPTER_PATH_FIELD_NUMBER: _ClassVar[int]
    COMPOSITION_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    adapter_path: str
    composition: Composition
    policy: Policy
    adapter_digest: str
    def __init__(self, adapter_path: _Optional[str] = ..., composition: _Optional[_Union[Composition, _Mapping]] = ..., policy: _Optional[_Union[Policy, str]] = ..., adapter_digest: _Optional[str] = ...) -> None: ...

class Composition(_message.Message):
    __slots__ = ("method", "parts", "density", "seed", "rank")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    method: CompositionMethod
    parts: _containers.RepeatedCompositeFieldContainer[CompositionPart]
    density: float
    seed: int
    rank: int
    def __init__(self, method: _Optional[_Union[CompositionMethod, str]] = ..., parts: _Optional[_Iterable[_Union[CompositionPart, _Mapping]]] = ..., density: _Optional[float] = ..., seed: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class CompositionPart(_message.Message):
    __slots__ = ("adapter_path", "weight")
    ADAPTER_PATH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    adapter_path: str
    weight: float
    def __init__(self, adapter_path: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class Fidelity(_message.Message):
    __slots__ = ("delta_over_weight", "delta_error", "unchanged_share")
    DELTA_OVER_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DELTA_ERROR_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_SHARE_FIELD_NUMBER: _ClassVar[int]
    delta_over_weight: float
    delta_error: float
    unchanged_share: float
    def __init__(self, delta_over_weight: _Optional[float] = ..., delta_error: _Optional[float] = ..., unchanged_share: _Optional[float] = ...) -> None: ...

class CreateDeploymentRequest(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class CreateDeploymentResponse(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class GetDeploymentRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetDeploymentResponse(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class ListDeploymentsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDeploymentsResponse(_message.Message):
    __slots__ = ("deployments", "next_page_token")
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    deployments: _containers.RepeatedCompositeFieldContainer[Deployment]
    next_page_token: str
    def __init__(self, deployments: _Optional[_Iterable[_Union[Deployment, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateDeploymentRequest(_message.Message):
    __slots__ = ("deployment", "update_mask")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MASK_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    update_mask: _field_mask_pb2.FieldMask
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class UpdateDeploymentResponse(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class StreamUpdateDeploymentRequest(_message.Message):
    __slots__ = ("deployment", "update_mask")
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MASK_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    update_mask: _field_mask_pb2.FieldMask
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class StreamUpdateDeploymentResponse(_message.Message):
    __slots__ = ("progress", "deployment")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    progress: UpdateProgress
    deployment: Deployment
    def __init__(self, progress: _Optional[_Union[UpdateProgress, _Mapping]] = ..., deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class UpdateProgress(_message.Message):
    __slots__ = ("stage", "parameters_done", "parameters_total", "in_flight")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DONE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    stage: UpdateStage
    parameters_done: int
    parameters_total: int
    in_flight: int
    def __init__(self, stage: _Optional[_Union[UpdateStage, str]] = ..., parameters_done: _Optional[int] = ..., parameters_total: _Optional[int] = ..., in_flight: _Optional[int] = ...) -> None: ...

class RollbackDeploymentRequest(_message.Message):
    __slots__ = ("name", "etag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    etag: str
    def __init__(self, name: _Optional[str] = ..., etag: _Optional[str] = ...) -> None: ...

class RollbackDeploymentResponse(_message.Message):
    __slots__ = ("deployment",)
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    deployment: Deployment
    def __init__(self, deployment: _Optional[_Union[Deployment, _Mapping]] = ...) -> None: ...

class DeleteDeploymentRequest(_message.Message):
    __slots__ = ("name", "etag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    etag: str
    def __init__(self, name: _Optional[str] = ..., etag: _Optional[str] = ...) -> None: ...

class DeleteDeploymentResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdviseDeploymentRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class AdviseDeploymentResponse(_message.Message):
    __slots__ = ("policy", "lines", "moments", "alone", "overhead_ratio")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    MOMENTS_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    OVERHEAD_RATIO_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    lines: _containers.RepeatedScalarFieldContainer[str]
    moments: int
    alone: float
    overhead_ratio: float
    def __init__(self, policy: _Optional[_Union[Policy, str]] = ..., lines: _Optional[_Iterable[str]] = ..., moments: _Optional[int] = ..., alone: _Optional[float] = ..., overhead_ratio: _Optional[float] = ...) -> None: ...
