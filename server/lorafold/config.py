"""`lorafold.toml` as frozen objects. Each default lives here, once; the command line and the docs read it from here."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from platformdirs import user_cache_path
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from lorafold.deployment_config import DeploymentConfig, Section
from lorafold.errors import ConfigError
from lorafold_adapters.gate import MAX_DELTA_ERROR
from lorafold_adapters.undo_kinds import UndoKind

BASE = "base"
"""The deployment that is always there: the base model without an adapter."""

NOT_IN_FILE = {"folder", "stem"}
"""Keys of Config that the file itself gives."""
SENTENCES = {"missing": "is missing: add it"}
"""Better words for some of pydantic's errors."""


def check_address(value: str) -> str:
    """Raises ValueError unless `value` is host:port."""
    host, colon, port = value.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) <= 65535):
        raise ValueError(f"{value!r} is no host:port with a port of 0 to 65535")
    return value


Provenance = Literal["dequantised base", "16-bit checkpoint"]
"""The same as the plugin's, which would bring torch in here."""
Address = Annotated[str, AfterValidator(check_address)]


class BaseConfig(Section):
    """`[base]`: the model that every adapter shares."""

    model: str
    """A transformers folder, or a name on the Hugging Face hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: the checkpoint's own."""
    device: str = "auto"
    """`auto`: the first GPU, or else the CPU."""
    quantise: Literal["none", "nf4", "int8"] = "none"
    """What bitsandbytes makes of the linear layers while they are loaded; a checkpoint that is quantised stays so."""


class ServerConfig(Section):
    """`[server]`: where to listen."""

    address: Address = "127.0.0.1:50051"
    """gRPC. A port of 0 takes a free one."""
    metrics_address: Address = "127.0.0.1:9464"
    """Prometheus, at /metrics, and a page for people, at /."""
    grace_seconds: Annotated[float, Field(ge=0)] = 30.0
    """After SIGTERM: how long requests in flight may take to finish."""
    export_folder: str | None = None
    """Where clients may have merged checkpoints written, relative to the file; nowhere unless given."""
    state_file: str | None = None
    """Where deployments are remembered, relative to the file; beside it unless given, as `lorafold.state.json` for
    `lorafold.toml`. "": nowhere; a restart then forgets what clients changed.
    """


class EngineConfig(Section):
    """`[engine]`: what runs at once."""

    max_batch: Annotated[int, Field(gt=0)] = 32
    """Sequences that run at once."""
    kv_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory for keys and values; unless given, a quarter of the host's free memory, or what a GPU has left."""
    max_context: Annotated[int, Field(gt=1)] = 4096
    """Tokens of prompt and answer together; less if the model has less."""
    max_queue: Annotated[int, Field(gt=0)] = 1024
    """Requests that may wait."""
    prefill_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens of one step at most while prompts are read: other answers wait for so long. Unless given, 128 on a CPU
    and 1024 on a GPU.
    """
    compile: bool = False
    """On a CPU: compile decode steps without low-rank paths. Needs a C++ compiler, and most of a minute at start-up."""
    default_max_tokens: Annotated[int, Field(gt=0)] = 256
    """For requests that do not say."""


class FoldConfig(Section):
    """`[fold]`: how adapters are written into the weights, and the base given back."""

    undo: UndoKind = "auto"
    """Where the base is kept meanwhile: `checkpoint` (its files, mapped into memory: takes none), `host`, `device`, or
    `sparse` (only what rounding loses, where memory is short; slower). `auto`: `checkpoint` on a CPU, `host` on a GPU.
    """
    max_delta_error: Annotated[float, Field(gt=0)] = MAX_DELTA_ERROR
    """Adapters of whose delta a fold would lose more than this share, by norm, are not folded."""
    requantise: bool = False
    """Quantised bases: quantise the folded weights again, instead of keeping 16-bit copies of those that change."""
    provenance: Provenance = "dequantised base"
    """Quantised bases: fold into what the quantised weights are worth, or into the 16-bit ones in `base.model`."""


class PolicyConfig(Section):
    """`[policy]`: how adapters share the weights."""

    swap_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the time that changes of the weights may take while several adapters need to be folded in turn."""
    max_wait_seconds: Annotated[float, Field(gt=0)] = 1.0
    """How long requests may wait for their turn; it comes before `swap_share`."""


class ResidencyConfig(Section):
    """`[residency]`: where adapters are kept. Those that requests need now are on the device; the least recently used
    ones make room for them.
    """

    device_slots: Annotated[int, Field(gt=0)] = 256
    """Adapters on the device at once."""
    device_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory that they may take there; as much as there is unless given."""
    host_memory_gib: Annotated[float, Field(gt=0)] = 8.0
    """Host memory for adapters; the rest are read from disk when they are needed."""


class MetricsConfig(Section):
    """`[metrics]`: what Prometheus is told; where is `server.metrics_address`."""

    compat: Literal["none", "vllm"] = "none"
    """`vllm`: count under vLLM's names too, for its Grafana dashboard and for llm-d's endpoint picker."""
    deployments: Annotated[int, Field(ge=0)] = 30
    """Deployments that have a label of their own, those that are asked for first; the rest is `other`."""


class ProbeConfig(Section):
    """`[probe]`: what the unmerged path costs, measured without being asked."""

    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """While nobody has requests: measure what is older than that; never unless given."""


class IdentityConfig(Section):
    """`[identity]`: which base an adapter was trained on, as its stamp says."""

    unstamped: Literal["allow", "warn", "refuse"] = "warn"
    """What to do with an adapter without a stamp; `lorafold stamp` makes one."""
    cache: str | None = None
    """A folder, relative to the file, where fingerprints of bases are remembered; the user's cache unless given."""


class LogConfig(Section):
    """`[log]`: what goes to stderr."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section):
    """The whole file."""

    base: BaseConfig
    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    fold: FoldConfig = FoldConfig()
    policy: PolicyConfig = PolicyConfig()
    residency: ResidencyConfig = ResidencyConfig()
    metrics: MetricsConfig = MetricsConfig()
    probe: ProbeConfig = ProbeConfig()
    identity: IdentityConfig = IdentityConfig()
    log: LogConfig = LogConfig()
    deployments: list[DeploymentConfig] = Field(default_factory=list)
    folder: Path = Path()
    """Where the file lies; relative adapter paths start here. Not a key of the file."""
    stem: str = "lorafold"
    """The file's name without `.toml`. Not a key of the file."""


def load_config(file: Path) -> Config:
    """Reads `file`. Raises ConfigError with the key and what is wrong with it."""
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read '{file}': {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"'{file}' is not valid TOML: {error}") from error
    return parse_config(content, file)


def parse_config(content: dict[str, Any], file: Path) -> Config:
    """Checks the contents of `file`. Raises ConfigError."""
    for key in NOT_IN_FILE & content.keys():
        raise ConfigError(f"'{file}': unknown key '{key}'")
    try:
        config = Config.model_validate({**content, "folder": file.parent, "stem": file.stem})
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # A typo makes others missing.
        key = ".".join(str(part) for part in first["loc"])
        sentence = SENTENCES.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            sentence = f"no such key: known here are {', '.join(keys_beside(first['loc']))}"
        raise ConfigError(f"'{file}': key '{key}': {sentence[0].lower()}{sentence[1:]}") from error
    names = [deployment.name for deployment in config.deployments]
    for name in names:
        if name == BASE:
            raise ConfigError(f"'{file}': deployment 'base' is built in: choose another name")
        if names.count(name) > 1:
            raise ConfigError(f"'{file}': deployment '{name}' is there twice: every name once")
    return config


def keys_beside(place: tuple[int | str, ...]) -> list[str]:
    """The keys of the table in which an unknown one is."""
    table: type[BaseModel] = Config
    for part in place[:-1]:
        if isinstance(part, str):
            kind = table.model_fields[part].annotation
            nested = [found for found in (kind, *get_args(kind)) if isinstance(found, type)]
            table = next(found for found in nested if issubclass(found, BaseModel))
    return [key for key in table.model_fields if table is not Config or key not in NOT_IN_FILE]


def fingerprint_folder(config: Config) -> Path:
    """Where fingerprints of bases are remembered."""
    cache = config.identity.cache
    return user_cache_path("lorafold") / "fingerprints" if cache is None else config.folder / cache


def state_path(config: Config) -> Path | None:
    """The file that deployments are remembered in; None for none."""
    named = config.server.state_file
    if named is None:
        return config.folder / f"{config.stem}.state.json"
    return config.folder / named if named else None


def local_model_path(config: Config) -> str:
    """The base's folder if it is one beside the file, or else its name on the hub."""
    beside = config.folder / config.base.model
    return str(beside) if beside.is_dir() else config.base.model
