"""Every setting: its type, default, unit, range and sentence. The README's table and deploy/iccache.toml follow.

A configuration is a value: it opens nothing and reads no key. `load` is the only reader of files and environment;
keys are looked up by `secret` and `key_in`, by way of the environment variables that the file names.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from iccache.errors import ConfigError
from iccache.postgres_url import NO_KEY, is_postgres, unfit

ENV_PREFIX = "ICCACHE_"
DEFAULT_FILE = Path("iccache.toml")
DIALECTS: tuple[Literal["chat", "responses", "messages"], ...] = ("chat", "responses", "messages")

LEARNING_POLICIES = frozenset({"linear-thompson", "linear-ucb", "neural-thompson", "threshold"})
PHONE_REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "PL", "SE", "BR", "JP", "IN")

Placement = Literal["start", "end"]
Port = Annotated[int, Meta(ge=0, le=65535)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")]


def say(sentence: str, unit: str = "") -> Meta:
    """The sentence (and unit) of one setting."""
    return Meta(description=sentence, extra={"unit": unit})


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the configuration file."""


class Server(Section, frozen=True):
    host: Annotated[str, say("Address to listen on. Beyond loopback, tenants with keys are required.")] = "127.0.0.1"
    port: Annotated[Port, say("Port to listen on; 0 takes a free one and prints it.")] = 8080
    workers: Annotated[AtLeastOne, say("Processes that share the port and the store.")] = 1
    admin_key_env: Annotated[
        str,
        say("Environment variable with the key of /admin; when it is not set, /admin answers on loopback only."),
    ] = "ICCACHE_ADMIN_KEY"
    max_body_bytes: Annotated[AtLeastOne, say("Largest body of a request that is read; above it 413.", "bytes")] = (
        32 * 1024 * 1024
    )
    body_timeout_s: Annotated[Positive, say("Longest wait for the next piece of a request's body; then 408.", "s")] = 30
    drain_s: Annotated[NotNegative, say("On SIGTERM, how long open answers may still run.", "s")] = 30


class Store(Section, frozen=True):
    url: Annotated[
        str,
        say("Where exchanges and examples live: sqlite:///FILE; for several machines postgresql://USER@HOST/DATABASE."),
    ] = "sqlite:///iccache.db"
    keep_exchanges_days: Annotated[
        NotNegative, say("Exchanges older than this are deleted by replay; 0 keeps them.", "days")
    ] = 30
    key_env: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        say("Environment variable with the key that encrypts it, 64 hexadecimal digits; none: it is not encrypted."),
    ] = None
    max_bytes: Annotated[
        Count, say("When the store's files exceed this, recording stops and serving goes on; 0: no limit.", "bytes")
    ] = 0


class Tenant(Section, frozen=True):
    name: Annotated[Name, say("Name of the tenant. Examples never cross tenants.")]
    key_env: Annotated[str | list[str], say("Environment variable, or list of them, with this tenant's API keys.")]
    requests_per_minute: Annotated[Count, say("Above it 429 with Retry-After; 0: no limit.", "1/min")] = 0
    usd_per_day: Annotated[
        NotNegative, say("When today's (UTC) answers have cost this, 429 until midnight; 0: no limit.", "USD")
    ] = 0
    store: Annotated[bool, say("Whether anything of this tenant's requests is recorded.")] = True
    quarantine: Annotated[
        bool, say("New examples are held until two other end users got the same answer, or a check or judge agrees.")
    ] = False
    keep_days: Annotated[
        NotNegative, say("This tenant's requests and examples are erased when older than this; 0: no end.", "days")
    ] = 0

    @property
    def key_envs(self) -> list[str]:
        return [self.key_env] if isinstance(self.key_env, str) else self.key_env


class Backend(Section, frozen=True):
    name: Annotated[Name, say("Name in headers, metrics and the record; as `model` it pins this backend.")]
    base_url: Annotated[str, Meta(pattern=r"^https?://"), say("OpenAI-compatible base URL, usually ending in /v1.")]
    model: Annotated[str, Meta(min_length=1), say("Model name that goes upstream.")]
    key_env: Annotated[str | None, say("Environment variable with the key that goes upstream; none: no key.")] = None
    usd_per_million_input_tokens: Annotated[NotNegative, say("Price of input.", "USD per million tokens")] = 0
    usd_per_million_output_tokens: Annotated[NotNegative, say("Price of output.", "USD per million tokens")] = 0
    usd_per_million_cached_input_tokens: Annotated[
        NotNegative | None,
        say("Price of input from its prompt cache; unset: as other input.", "USD per million tokens"),
    ] = None
    context_window_tokens: Annotated[AtLeastOne, say("Longest prompt and answer together.", "tokens")] = 8192
    max_in_flight: Annotated[
        AtLeastOne,
        say(
            "Requests at once that mean full load, the unit of iccache_load; more are sent on, to its own queue.",
            "requests",
        ),
    ] = 16
    requests_per_minute: Annotated[
        Count,
        say("What it may be asked, in bursts of ten seconds' worth; others answer the rest. 0: no limit.", "1/min"),
    ] = 0
    tokens_per_minute: Annotated[
        Count, say("Tokens of prompts and answers, likewise; counted as answers end. 0: no limit.", "tokens/min")
    ] = 0
    metrics_url: Annotated[
        str | None,
        say(
            "vLLM's or llama.cpp's /metrics: requests that others sent count as load too. Unset: only those from here."
        ),
    ] = None
    timeout_s: Annotated[Positive, say("Longest whole answer.", "s")] = 600
    connect_timeout_s: Annotated[Positive, say("Longest wait for a connection.", "s")] = 5
    first_token_timeout_s: Annotated[Positive, say("Longest wait for the first byte of an answer.", "s")] = 120
    idle_timeout_s: Annotated[Positive, say("Longest silence between two pieces of an answer.", "s")] = 60
    max_answer_bytes: Annotated[
        AtLeastOne, say("Longest answer that is no stream; streams have no limit.", "bytes")
    ] = 64 * 1024 * 1024
    teacher: Annotated[bool | None, say("Its answers may become examples. Unset: only the dearest backend's may.")] = (
        None
    )
    student: Annotated[bool | None, say("It may be shown examples. Unset: every backend but the teachers.")] = None
    dialects: Annotated[
        list[Literal["chat", "responses", "messages"]], Meta(min_length=1), say("The APIs it speaks.")
    ] = msgspec.field(default_factory=lambda: list(DIALECTS))
    tokenizer: Annotated[
        str,
        say("Counts its tokens where it does not: an encoding (o200k_base, cl100k_base) or a tokenizer.json."),
    ] = "o200k_base"


class Embedder(Section, frozen=True):
    backend: Annotated[
        Literal["static", "sentence-transformers", "onnx", "onnx-int8", "remote", "hash"],
        say("What runs the model: static looks up a table of word vectors; hash compares words and needs no model."),
    ] = "static"
    model: Annotated[
        str,
        say("all-MiniLM-L6-v2 (static: the table made of it), a folder of the backend's kind, or the remote's name."),
    ] = "all-MiniLM-L6-v2"
    base_url: Annotated[
        Annotated[str, Meta(pattern=r"^https?://")] | None,
        say("Of the backend remote: OpenAI-compatible base URL with /embeddings."),
    ] = None
    key_env: Annotated[str | None, say("Environment variable with the key for it; none: no key.")] = None
    timeout_s: Annotated[Positive, say("Longest silence of that endpoint.", "s")] = 10
    batch: Annotated[AtLeastOne, say("Concurrent requests embedded together, at most.", "texts")] = 32
    cache_entries: Annotated[Count, say("Embeddings kept in memory, so that repeated text costs nothing.", "texts")] = (
        10_000
    )
    threads: Annotated[AtLeastOne, say("Threads of the embedding model.", "threads")] = 1


class Selection(Section, frozen=True):
    recall_k: Annotated[AtLeastOne, say("Nearest examples that are considered.", "examples")] = 16
    max_examples: Annotated[Count, say("Examples that are shown, at most.", "examples")] = 3
    max_tokens: Annotated[Count, say("Tokens that examples may take in a prompt, at most.", "tokens")] = 2048
    placement: Annotated[
        Placement,
        say(
            "Examples go before the conversation (start) or before its last question (end), which keeps prompt caches."
        ),
    ] = "start"
    writer_share: Annotated[
        Share, say("Share of the examples shown at once that may be of one other end user; one always may.")
    ] = 0.5
    writer_share_over_time: Annotated[
        Share, say("Share of a tenant's latest showings that may be of one end user's examples to others; 1: no limit.")
    ] = 0.2
    consensus_similarity: Annotated[
        Share,
        say("Similarity of requests above which an unproven answer may not contradict what others agree on; 1: off."),
    ] = 0.9
    consensus_share: Annotated[
        Share,
        say(
            "Share of the other end users found that have to have one answer before an unproven one that none has is "
            "left out; 1: off."
        ),
    ] = 0.6
    threshold: Annotated[
        float | Literal["auto"],
        say('Utility below which an example is not shown; "auto": 0, or what replay has measured to gain too little.'),
    ] = "auto"
    shared_examples: Annotated[
        Count, say("Examples of a shared set, which replay builds for each kind of request; 0: none.", "examples")
    ] = 8
    exploration: Annotated[
        Share, say("Share of requests in which the ways to show examples are tried by how likely each is the best.")
    ] = 0.8
    leave_out_share: Annotated[
        Share, say("Share of requests that are shown one example less, so that its effect is measured.")
    ] = 0.05


class Routing(Section, frozen=True):
    models: Annotated[list[str], say('Model names that are routed; "*" takes every unknown name.')] = msgspec.field(
        default_factory=lambda: ["auto"]
    )
    policy: Annotated[
        Literal["linear-thompson", "linear-ucb", "neural-thompson", "threshold", "uniform", "teacher", "student"],
        say("How a backend is chosen; those that do not learn are baselines to compare with."),
    ] = "linear-thompson"
    quality_target: Annotated[
        Share,
        say(
            "Share of the teacher's quality that a cheaper backend has to keep: expected to, to be preferred; "
            "and where it is shown not to, it is held back. 0: never."
        ),
    ] = 0.7
    confidence: Annotated[
        float,
        Meta(gt=0, lt=1),
        say("Confidence at which a backend is shown to keep quality_target, or to fall short of it."),
    ] = 0.95
    probe_share: Annotated[
        Share, say("Most of the requests that a backend gets where it is held back, so that it can be seen to recover.")
    ] = 0.1
    certify_first: Annotated[
        bool, say("Offload only where the evidence already says, at routing.confidence, that quality_target is kept.")
    ] = False
    shadow: Annotated[bool, say("Decide and log, but let the teacher answer everything.")] = False
    holdout_share: Annotated[Share, say("Share of routed requests that goes to the teacher at random.")] = 0.0
    exploration: Annotated[Share, say("Share of routed requests spread evenly over the backends.")] = 0.05
    theta: Annotated[NotNegative, say("Load of the dear backends (1 = full) above which they lose score.")] = 0.8
    lambda0: Annotated[NotNegative, say("Most that load takes from a score, in quality.")] = 0.5
    gamma: Annotated[NotNegative, say("How fast the load's influence saturates.")] = 2.0
    retry_share: Annotated[
        Share, say("Requests that may be sent once more where every backend has failed, as a share of all; 0: none.")
    ] = 0.1
    decision_timeout_ms: Annotated[
        Positive, say("Longest embedding, recall, ranking and routing; then the teacher answers plain.", "ms")
    ] = 1000


class Judge(Section, frozen=True):
    backend: Annotated[str | None, say("Backend that compares two answers; none: the dearest.")] = None
    sample_rate: Annotated[
        Share, say("Share of offloaded (or withheld) answers that are compared with the teacher's, after the reply.")
    ] = 0.0
    duel_share: Annotated[
        Share,
        say("Share of the requests at which the router is of two minds whose two likeliest backends are compared."),
    ] = 0.0
    usd_per_day: Annotated[
        NotNegative, say("Most that those comparisons may cost a day (UTC), answers asked for them included.", "USD")
    ] = 1.0


class Cache(Section, frozen=True):
    capacity_bytes: Annotated[
        AtLeastOne, say("Most that examples may weigh (text, embedding, index); what is above is evicted.", "bytes")
    ] = 1_000_000_000
    decay_per_hour: Annotated[Share, say("What is left after an hour of an example's value.")] = 0.9
    ttl_days: Annotated[
        NotNegative, say("Examples older than this are not shown and are evicted; 0: no end.", "days")
    ] = 0
    admit: Annotated[Literal["teacher", "none"], say("Whose answers become examples: the teachers', or nobody's.")] = (
        "teacher"
    )
    quality_floor: Annotated[
        Share, say("An example whose own answer is known to be worse than this is kept for replay, and not shown.")
    ] = 0.3
    merge_similarity: Annotated[
        Share, say("Similarity of requests from which on an agreeing answer strengthens the example that is there.")
    ] = 0.97
    screen: Annotated[bool, say("Make no example of text that is written to steer a model.")] = True
    reuse: Annotated[Literal["off", "exact"], say("Whether an identical request may be answered from the record.")] = (
        "off"
    )
    reuse_ttl_s: Annotated[Positive, say("How long an answer may be handed out again.", "s")] = 3600


class Privacy(Section, frozen=True):
    redact: Annotated[
        bool, say("Replace addresses, phone, card, account and identity numbers and keys before anything is written.")
    ] = True
    patterns: Annotated[list[str], say("Further regular expressions to redact.")] = []
    phone_regions: Annotated[
        list[str], say("Countries (ISO 3166) whose phone numbers are known as they are written at home; may be empty.")
    ] = msgspec.field(default_factory=lambda: list(PHONE_REGIONS))


class Replay(Section, frozen=True):
    usd_budget: Annotated[NotNegative, say("Most that one run may spend; asked before each call.", "USD")] = 1.0
    samples: Annotated[AtLeastOne, say("New answers asked for per example and round, at most.", "answers")] = 3
    max_rounds: Annotated[AtLeastOne, say("Rounds of replay one example gets in its life.", "rounds")] = 5
    merge: Annotated[bool, say("Make one of examples with nearly the same request and the same answer.")] = True
    distil: Annotated[bool, say("Let the teacher write guidance from clusters of examples, to be shown like them.")] = (
        False
    )
    payback_days: Annotated[
        Positive, say("A run stops where the offloads that its rounds win do not pay for them within this.", "days")
    ] = 30
    pause_above_load: Annotated[NotNegative, say("Replay waits while the proxy's load is above this.")] = 0.5


class Config(Section, frozen=True):
    """The whole file."""

    server: Server = Server()
    store: Store = Store()
    tenants: list[Tenant] = []
    backends: list[Backend] = []
    embedder: Embedder = Embedder()
    selection: Selection = Selection()
    routing: Routing = Routing()
    judge: Judge = Judge()
    cache: Cache = Cache()
    privacy: Privacy = Privacy()
    replay: Replay = Replay()

    def by_price(self) -> list[Backend]:
        """Backends, cheapest first: by output price, then input price, then as listed."""
        return sorted(self.backends, key=lambda b: (b.usd_per_million_output_tokens, b.usd_per_million_input_tokens))

    def teachers(self) -> list[Backend]:
        """Backends whose answers may become examples, cheapest first; never empty when there are backends."""
        named = [b for b in self.by_price() if b.teacher]
        return named or [b for b in self.by_price() if b.teacher is not False][-1:] or self.by_price()[-1:]

    def students(self) -> list[Backend]:
        """Backends that may be shown examples, cheapest first."""
        teachers = {b.name for b in self.teachers()}
        return [b for b in self.by_price() if (b.name not in teachers if b.student is None else b.student)]


def load(path: Path | None, environ: Mapping[str, str] | None = None) -> Config:
    """The configuration in `path`, overridden by `ICCACHE_SECTION__KEY` variables.

    With no path: iccache.toml in the working directory if it is there, else the built-in defaults.
    Raises ConfigError, with one line per mistake.
    """
    environ = os.environ if environ is None else environ
    if path is None:
        path = DEFAULT_FILE if DEFAULT_FILE.exists() else None
    data = _read(path) if path else {}
    laid_over = _override(data, environ)
    sources = [str(path)] if path else []
    if laid_over:
        sources.append(", ".join(laid_over))
    return parse(data, source=" with ".join(sources) or "the defaults")


def parse(data: dict[str, Any], source: str = "configuration") -> Config:
    """`data` as a Config. Raises ConfigError naming every mistake that one look finds."""
    unknown = list(_unknown_keys(Config, data, ""))
    if unknown:
        raise ConfigError("\n".join(f"{source}: {line}" for line in unknown))
    try:
        config = msgspec.convert(data, Config, strict=False)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{source}: {_readable(str(exc), data)}") from exc
    mistakes = list(_mistakes(config))
    if mistakes:
        raise ConfigError("\n".join(f"{source}: {line}" for line in mistakes))
    return config


def secret(environ: Mapping[str, str], name: str, wanted_by: str) -> str:
    """The key in environment variable `name` (`key_in`). Raises ConfigError where there is none."""
    value = key_in(environ, name)
    if value is None:
        raise ConfigError(f"{wanted_by}: the environment variable {name} is not set")
    if not value.isascii() or not value.isprintable():
        raise ConfigError(f"{wanted_by}: the key in {name} has characters that no header can carry")
    return value


def key_in(environ: Mapping[str, str], name: str) -> str | None:
    """The key in environment variable `name`, else in the file that `name`_FILE names, which may be replaced while we
    run; None where there is neither. Raises ConfigError for a file that cannot be read."""
    value = environ.get(name, "").strip()
    file = environ.get(f"{name}_FILE", "").strip()
    if value or not file:
        return value or None
    try:
        return Path(file).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise ConfigError(f"{name}_FILE: {file} cannot be read: {why}") from exc


def is_loopback(host: str) -> bool:
    """Whether listening on `host` is reachable from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_of(place: str) -> str:
    """`host:port` without the port."""
    return place[: place.find("]") + 1] if place.startswith("[") else place.partition(":")[0]


class Setting(NamedTuple):
    """One row of the table of settings."""

    section: str
    key: str
    type: str
    default: str
    unit: str
    sentence: str


REPEATED: dict[str, type[Section]] = {"tenants": Tenant, "backends": Backend}


def settings() -> Iterator[Setting]:
    """Every setting there is, in the order of the file."""
    for section in msgspec.structs.fields(Config):
        struct: type[Section] = REPEATED.get(section.name) or _section_type(section.type)
        hints = get_type_hints(struct, include_extras=True)
        for info in msgspec.structs.fields(struct):
            sentence, unit = _said(hints[info.name])
            if info.default is not msgspec.NODEFAULT:
                default = _toml(info.default)
            elif info.default_factory is not msgspec.NODEFAULT:
                default = _toml(info.default_factory())
            else:
                default = "required"
            yield Setting(section.name, info.name, _type_name(hints[info.name]), default, unit, sentence)


def example_toml() -> str:
    """A complete configuration file: every key with its default, its unit and its sentence."""
    lines = ["# Every setting of iccache with its default. `iccache config --example` prints this file."]
    for section in msgspec.structs.fields(Config):
        rows = [s for s in settings() if s.section == section.name]
        samples: list[dict[str, Any]] = EXAMPLES.get(section.name, [{}])
        for sample in samples:
            off = "# " if section.name == "tenants" else ""
            lines += ["", f"{off}[[{section.name}]]" if section.name in REPEATED else f"[{section.name}]"]
            for row in rows:
                value = _toml(sample[row.key]) if row.key in sample else row.default
                hidden = "# " if value == "none" and not off else off
                unit = f" [{row.unit}]" if row.unit else ""
                lines.append(f"{hidden}{row.key} = {'...' if value == 'none' else value}  # {row.sentence}{unit}")
    return "\n".join(lines) + "\n"


EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "tenants": [{"name": "team-a", "key_env": "TEAM_A_KEY"}],
    "backends": [
        {
            "name": "small",
            "base_url": "http://127.0.0.1:9001/v1",
            "model": "qwen2.5-0.5b-instruct",
            "usd_per_million_input_tokens": 0.05,
            "usd_per_million_output_tokens": 0.2,
        },
        {
            "name": "large",
            "base_url": "http://127.0.0.1:9002/v1",
            "model": "qwen2.5-32b-instruct",
            "usd_per_million_input_tokens": 1.0,
            "usd_per_million_output_tokens": 4.0,
            "context_window_tokens": 32768,
        },
    ],
}


def markdown_table() -> str:
    """Every setting as the table in the README."""
    lines = ["| setting | type | default | unit | |", "|---|---|---|---|---|"]
    for row in settings():
        lines.append(f"| `{row.section}.{row.key}` | {row.type} | `{row.default}` | {row.unit} | {row.sentence} |")
    return "\n".join(lines) + "\n"


def without_passwords(text: str) -> str:
    """A printed configuration without the passwords of its addresses."""
    text = re.sub(r"(?<=://)([^/\s\"@:]*):[^/\s\"@]*(?=@)", r"\1:***", text)
    return re.sub(r"([?&](?:ssl)?password=)[^&\s\"]*", r"\1***", text)


def to_json(config: Config) -> str:
    """`config` as JSON, indented. Holds no key, only the names of keys."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2).decode()


def to_toml(config: Config) -> str:
    """`config` as a file that `load` reads back to an equal value. Holds no key, only the names of keys."""
    lines: list[str] = []
    for name, value in msgspec.structs.asdict(config).items():
        for table in value if isinstance(value, list) else [value]:
            lines.append(f"[[{name}]]" if isinstance(value, list) else f"[{name}]")
            for key, item in msgspec.structs.asdict(table).items():
                if item is not None:
                    lines.append(f"{key} = {_toml(item)}")
            lines.append("")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigError(f"{path}: no such file") from exc
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: is not TOML: {exc}") from exc


def _override(data: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Lay the variables named ICCACHE_SECTION__KEY over `data`; their names. Lists are JSON or comma-separated.

    Tables that repeat are reached by position or name: ICCACHE_BACKENDS__0__BASE_URL, ICCACHE_BACKENDS__SMALL__MODEL.
    """
    laid_over = []
    for variable, text in sorted(environ.items()):
        path = variable.removeprefix(ENV_PREFIX).lower().split("__")
        if not variable.startswith(ENV_PREFIX) or len(path) < 2:
            continue
        laid_over.append(variable)
        section = path[0]
        if section in REPEATED:
            if len(path) == 3:
                table = _repeated(data, section, path[1], variable)
                table[path[2]] = _value(REPEATED[section], path[2], text)
                continue
            raise ConfigError(f"{variable}: name it {ENV_PREFIX}{section.upper()}__<position or name>__<KEY>")
        if len(path) != 2:
            raise ConfigError(f"{variable}: name it {ENV_PREFIX}<SECTION>__<KEY>")
        sections = {f.name: f.type for f in msgspec.structs.fields(Config)}
        if section not in sections:
            raise ConfigError(f"{variable}: there is no section [{section}]{_nearest(section, sections)}")
        struct = _section_type(sections[section])
        keys = [f.name for f in msgspec.structs.fields(struct)]
        if path[1] not in keys:
            raise ConfigError(f"{variable}: unknown key {section}.{path[1]}{_nearest(path[1], keys)}")
        table = data.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{section}: is a table, written [{section}]")
        table[path[1]] = _value(struct, path[1], text)
    return laid_over


def _repeated(data: dict[str, Any], section: str, place: str, variable: str) -> dict[str, Any]:
    tables: list[dict[str, Any]] = data.setdefault(section, [])
    if place.isdecimal():
        if int(place) == len(tables):
            tables.append({})
        if int(place) < len(tables):
            return tables[int(place)]
        raise ConfigError(f"{variable}: there are only {len(tables)} {section}")
    by_name = {re.sub(r"\W", "_", str(t.get("name", "")).lower()): t for t in tables}
    if place not in by_name:
        raise ConfigError(f"{variable}: no {section[:-1]} is named {place}{_nearest(place, by_name)}")
    return by_name[place]


def _value(struct: type[Section], key: str, text: str) -> Any:
    """`text` of an environment variable, read as a list where the key is one."""
    hints = get_type_hints(struct)
    if get_origin(hints.get(key)) is list:
        if text.lstrip().startswith("["):
            try:
                return msgspec.json.decode(text)
            except msgspec.DecodeError as exc:
                raise ConfigError(f"{key}: {text!r} is not a JSON list") from exc
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _unknown_keys(struct: type[Section], data: dict[str, Any], where: str) -> Iterator[str]:
    fields = {f.name: f.type for f in msgspec.structs.fields(struct)}
    for key, value in data.items():
        if key not in fields:
            yield f"unknown key {where}{key}{_nearest(key, fields)}"
        elif key in REPEATED and not where:
            for i, table in enumerate(value if isinstance(value, list) else []):
                if isinstance(table, dict):
                    yield from _unknown_keys(REPEATED[key], table, f"{key}[{i}].")
        elif not where and isinstance(value, dict):
            yield from _unknown_keys(_section_type(fields[key]), value, f"{key}.")


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}" if known else ""


def _readable(message: str, data: dict[str, Any]) -> str:
    """msgspec's 'Expected `int` >= 1 - at `$.server.port`' with the place first and what stands there."""
    what, _, place = message.partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    value: Any = data
    for step in re.findall(r"[^.\[\]]+", place):
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict):
            value = value.get(step)
    shown = f" (here: {value!r})" if place and not isinstance(value, dict | list) else ""
    if what.startswith("Invalid enum value"):
        what = "is none of " + ", ".join(_choices(place))
    return f"{place}: {what[:1].lower()}{what[1:]}{shown}" if place else what


def _choices(place: str) -> list[str]:
    """The words that the setting at `place` ("routing.policy", "backends[0].dialects[1]") may have."""
    section, setting, *_ = (step for step in re.findall(r"[^.\[\]]+", place) if not step.isdecimal())
    fields = {f.name: f.type for f in msgspec.structs.fields(Config)}
    struct = REPEATED[section] if section in REPEATED else _section_type(fields[section])
    return _literals({f.name: f.type for f in msgspec.structs.fields(struct)}[setting])


def _literals(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    if hint in (int, float):
        return ["a number"]
    return [word for part in get_args(hint) for word in _literals(part)]


def _mistakes(config: Config) -> Iterator[str]:
    """What types cannot say."""
    for section, names in (
        ("backends", [b.name for b in config.backends]),
        ("tenants", [t.name for t in config.tenants]),
    ):
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"{section}: {name} is listed twice"
    backends = {b.name for b in config.backends}
    for setting, url in _urls(config):
        if not _is_address(url):
            yield f"{setting}: {url!r} names no host and port that can be connected to"
    if config.judge.backend is not None and config.judge.backend not in backends:
        yield f"judge.backend: no backend is named {config.judge.backend}{_nearest(config.judge.backend, backends)}"
    if config.judge.sample_rate or config.judge.duel_share:
        by_default = config.by_price()[-1:]
        judge = next(
            (b for b in config.backends if b.name == config.judge.backend), by_default[0] if by_default else None
        )
        if judge is not None and "chat" not in judge.dialects:
            yield f"judge.backend: {judge.name} does not speak chat, in which a judge is asked"
    for name in config.routing.models:
        if name in backends:
            yield f"routing.models: {name} is a backend's name, which pins it"
    yield from _mistakes_of_store(config.store)
    for pattern in config.privacy.patterns:
        try:
            re.compile(pattern)
        except re.error as exc:
            yield f"privacy.patterns: {pattern!r} is not a regular expression: {exc}"
    for region in config.privacy.phone_regions:
        if not re.fullmatch("[A-Z]{2}", region):
            yield f"privacy.phone_regions: {region!r} is not a country's two capital letters"
    for tenant in config.tenants:
        if not tenant.key_envs or not all(tenant.key_envs):
            yield f"tenants: {tenant.name}: key_env names no environment variable, so nobody could be this tenant"
    if not config.tenants and not is_loopback(config.server.host):
        yield (
            f"server.host: {config.server.host} is reachable from other machines, "
            "so at least one [[tenants]] with a key is required"
        )


def _mistakes_of_store(store: Store) -> Iterator[str]:
    if is_postgres(store.url):
        if problem := unfit(store.url):
            yield f"store.url: {problem}"
        if store.key_env is not None:
            yield NO_KEY
    elif not store.url.startswith("sqlite:///"):
        yield f"store.url: is neither sqlite:///FILE nor postgresql://HOST/DATABASE (here: {store.url!r})"


def _urls(config: Config) -> Iterator[tuple[str, str]]:
    """Every address that a configuration names."""
    for i, backend in enumerate(config.backends):
        yield f"backends[{i}].base_url", backend.base_url
        if backend.metrics_url is not None:
            yield f"backends[{i}].metrics_url", backend.metrics_url
    if config.embedder.base_url is not None:
        yield "embedder.base_url", config.embedder.base_url


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0 and not re.search(r"[\s\x00-\x1f]", url)
    except ValueError:
        return False


def _section_type(hint: Any) -> type[Section]:
    if not (isinstance(hint, type) and issubclass(hint, Section)):
        raise TypeError(f"{hint} is not a section")
    return hint


def _said(hint: Any) -> tuple[str, str]:
    for meta in getattr(hint, "__metadata__", ()):
        if isinstance(meta, Meta) and meta.description:
            return meta.description, (meta.extra or {}).get("unit", "")
    return "", ""


def _type_name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return " or ".join(f'"{a}"' for a in args)
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if args:
        return " or ".join(_type_name(a) for a in args if a is not type(None))
    return {"str": "text", "float": "number", "int": "integer", "bool": "true or false"}[hint.__name__]


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        return msgspec.json.encode(value).decode()
    return repr(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)
