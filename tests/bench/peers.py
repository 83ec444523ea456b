"""Other gateways, each in an environment of its own under .bench, made when first asked for; else left out.

They are set up as their manuals have it for a plain pass-through: one worker, no logging of requests, no data base.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HOME = Path(os.environ.get("BENCH_PEERS", Path(__file__).resolve().parents[2] / ".bench"))
MADE_WITHIN_S = 1800
MODEL = "mock-model"

LITELLM = """
model_list:
  - model_name: mock-model
    litellm_params: {model: openai/mock-model, api_base: "http://127.0.0.1:%(upstream)d/v1", api_key: sk-none}
general_settings: {master_key: sk-bench}
litellm_settings: {request_timeout: 600, set_verbose: false}
"""
TENSORZERO = """
[gateway]
observability.enabled = false
[models.mock-model]
routing = ["mock"]
[models.mock-model.providers.mock]
type = "openai"
model_name = "mock-model"
api_base = "http://127.0.0.1:%(upstream)d/v1/"
api_key_location = "none"
"""
# It serves on a port of its own choice, which this prints.
EMBEDDED = """
import asyncio, re, sys, tensorzero
from openai import AsyncOpenAI

async def main():
    client = AsyncOpenAI(api_key="x")
    made = await tensorzero.patch_openai_client(client, config_file=sys.argv[1], clickhouse_url=None)
    print("PORT=" + re.search(r":(\\d+)/", str(made.base_url)).group(1), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
# Portkey 1.15.2 fails on streams under Node 20 with "immutable": that error alone is let pass.
PORTKEY_STREAMS = """
for (const name of ["append", "set", "delete"]) {
  const own = Headers.prototype[name];
  Headers.prototype[name] = function (...given) {
    try { return own.apply(this, given); } catch (error) { if (error?.message !== "immutable") throw error; }
  };
}
"""


class Peer(NamedTuple):
    """How to start one, and how it is asked."""

    name: str
    command: Sequence[str]
    ready: str  # a path that answers 200; "": the port answers
    model: str = MODEL
    path: str = "/v1/chat/completions"
    headers: Mapping[str, str] = {}
    environ: Mapping[str, str] = {}
    says_port: bool = False


class Missing(Exception):
    """It cannot be installed here; says why."""


def litellm(folder: Path, port: int, upstream: int) -> Peer:
    bin = _python("litellm", "litellm[proxy]==1.106.2")
    (folder / "litellm.yaml").write_text(LITELLM % {"upstream": upstream})
    command = [
        str(bin / "litellm"), "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port),
        "--num_workers", "1", "--telemetry", "False",
    ]  # fmt: skip
    quiet = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return Peer("LiteLLM", command, "/health/liveliness", environ=quiet)


def portkey(folder: Path, port: int, upstream: int) -> Peer:
    home = HOME / "portkey"
    start = home / "node_modules/@portkey-ai/gateway/build/start-server.js"
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise Missing("there is no Node")
    if not start.is_file():
        home.mkdir(parents=True, exist_ok=True)
        _run(["npm", "install", "--silent", "--prefix", str(home), "@portkey-ai/gateway@1.15.2"])
    (folder / "portkey.mjs").write_text(PORTKEY_STREAMS)
    command = ["node", "--import", str(folder / "portkey.mjs"), str(start), f"--port={port}", "--headless"]
    asked = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"http://127.0.0.1:{upstream}/v1"}
    return Peer("Portkey", command, "", headers=asked, environ={"NODE_ENV": "production"})


def tensorzero(folder: Path, port: int, upstream: int) -> Peer:
    bin = _python("tensorzero", "tensorzero==2026.6.0", "openai")
    (folder / "tensorzero.toml").write_text(TENSORZERO % {"upstream": upstream})
    (folder / "embedded.py").write_text(EMBEDDED)
    command = [str(bin / "python"), "-W", "ignore", str(folder / "embedded.py"), str(folder / "tensorzero.toml")]
    model = f"tensorzero::model_name::{MODEL}"
    return Peer("TensorZero, embedded", command, "", model, "/openai/v1/chat/completions", says_port=True)


PEERS: Sequence[Callable[[Path, int, int], Peer]] = (litellm, portkey, tensorzero)


def _python(name: str, *packages: str) -> Path:
    """The folder of an environment's programs."""
    home = HOME / name
    stamp = home / "made-of"
    if not stamp.is_file() or stamp.read_text() != " ".join(packages):
        _run([sys.executable, "-m", "venv", "--clear", str(home)])
        _run([str(home / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *packages])
        stamp.write_text(" ".join(packages))
    return home / "bin"


def _run(command: Sequence[str]) -> None:
    print(f"once: {' '.join(command[-3:])}", file=sys.stderr, flush=True)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=MADE_WITHIN_S)
    except (subprocess.SubprocessError, OSError) as exc:
        said = (getattr(exc, "stderr", None) or str(exc)).strip().splitlines() or [repr(exc)]
        raise Missing(said[-1][:200]) from exc
