"""`python -m iccache.demo.llama`: one model file as an OpenAI-compatible server on loopback, until it is ended."""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m iccache.demo.llama", description=__doc__)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--name", required=True, help="name under which the model answers")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens, for each slot")
    parser.add_argument("--slots", type=int, required=True, help="prompts whose beginnings stay computed")
    options = parser.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = {options.name}
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_ctx = options.context * options.slots
    params.n_parallel = options.slots
    params.cpuparams.n_threads = 1  # two servers on two cores: with two threads each they collapse
    params.cpuparams_batch.n_threads = 1
    params.cache_ram_mib = 0
    params.use_jinja = True
    params.ui = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
