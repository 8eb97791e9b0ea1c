"""`vlm2vla-server serve|check`."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm2vla_server import logs, serving
from vlm2vla_server import settings as settings_module
from vlm2vla_server.app import build_app
from vlm2vla_server.engines.base import Engine
from vlm2vla_server.errors import ConfigurationError
from vlm2vla_server.service import Service
from vlm2vla_server.settings import ENGINES, Settings

log = logging.getLogger("vlm2vla_server")

EXIT_OK, EXIT_NOT_READY, EXIT_USAGE, EXIT_ENGINE_DIED = 0, 1, 2, 3


def parser() -> argparse.ArgumentParser:
    """The command line. Every flag overrides its VLM2VLA_* variable; defaults are shown by `--help`."""
    root = argparse.ArgumentParser(prog="vlm2vla-server", description="Serve a VLM as a robot policy.")
    commands = root.add_subparsers(dest="command", required=True)
    for name, text in (
        ("serve", "load the model and answer requests"),
        ("check", "load the model, prove the adapters, print /info, and stop"),
    ):
        _add_flags(commands.add_parser(name, help=text, description=text))
    return root


def _add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--engine", choices=ENGINES, help="default: vllm; with --twin: transformers")
    add("--model", type=Path, metavar="FOLDER", help="Hugging Face folder of the base model")
    add(
        "--adapter",
        dest="adapters",
        action="append",
        metavar="NAME=PATH",
        help="PEFT adapter; repeatable; the first is the default model of requests",
    )
    add("--twin", action="store_true", default=None, help="the small embedded model: models/twin/base and its adapter")
    add("--verifier", metavar="NAME", help="adapter that answers /verify; default: the first, as everywhere")
    add("--verify-threshold", type=float, help="probability from which 'done' counts; default: its card's, else 0.5")
    add("--host", help="default: 127.0.0.1; any other needs --api-key")
    add("--port", type=int, help="default: 8000")
    add("--api-key", help="callers send 'Authorization: Bearer KEY'; better set as VLM2VLA_API_KEY")
    add("--max-concurrency", type=int, help="requests generating or waiting; default 16")
    add("--max-body-mb", type=int, help="largest request body; default 16")
    add("--max-row-translation-m", type=float, help="largest |dx|, |dy|, |dz| of a row in metres; default 0.10")
    add("--drain-s", type=float, help="seconds that running requests may go on after SIGTERM; default 8")
    add("--log-format", choices=logs.FORMATS, help="default json: one object a line on standard error")
    add("--log-texts", action="store_true", default=None, help="log prompts and raw model texts; for debugging")
    add("--threads", type=int, help="threads of the engine's arithmetic; default: all cores but one")
    add("--allow-unproven", action="store_true", default=None, help="serve adapters not proven active, policy false")
    add(
        "--engine-option",
        dest="engine_options",
        action="append",
        metavar="KEY=VALUE",
        help="passed to the engine: transformers takes device, dtype, prefix_cache_entries; vllm all of vLLM's own; "
        "openai url, dialect, grammar, base, model.NAME and time limits (docs/serve.md)",
    )


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Environment first, flags over it. Raises ConfigurationError."""
    values = settings_module.from_environment(os.environ)
    for name, value in vars(arguments).items():
        if name == "command" or value is None:
            continue
        if name == "adapters":
            value = tuple(settings_module.parse_adapter(text) for text in value)
        if name == "engine_options":
            value = tuple(settings_module.parse_option(text) for text in value)
        values[name] = value
    return settings_module.build(values, find_checkout(Path.cwd()))


def find_checkout(start: Path) -> Path:
    """The folder that holds models/twin: `start` or one above it, else the checkout this file lies in."""
    for folder in (start, *start.parents):
        if (folder / settings_module.TWIN_MODEL).is_dir():
            return folder
    return Path(__file__).resolve().parents[3]


def build_engine(settings: Settings) -> Engine:
    """The engine that the settings name. Raises ConfigurationError."""
    builders = {"transformers": _transformers_engine, "vllm": _vllm_engine, "openai": _openai_engine}
    try:
        return builders[settings.engine](settings)
    except ImportError as problem:
        raise ConfigurationError(
            f"the {settings.engine} engine needs {problem.name}: pip install 'vlm2vla-server[{settings.engine}]'"
        ) from problem


def _transformers_engine(settings: Settings) -> Engine:
    from vlm2vla_server.engines.hf_model import ModelOptions
    from vlm2vla_server.engines.transformers_engine import TransformersEngine

    options = dict(settings.engine_options)
    unknown = set(options) - {"device", "dtype", "prefix_cache_entries"}
    if unknown:
        raise ConfigurationError(f"--engine-option: the transformers engine has no option {', '.join(sorted(unknown))}")
    entries = options.get("prefix_cache_entries", "4")
    if not entries.isdigit() or int(entries) > 64:
        raise ConfigurationError("--engine-option prefix_cache_entries: expected 0 to 64")
    return TransformersEngine(
        ModelOptions(
            model=settings.require_model(),
            adapters=settings.adapters,
            device=options.get("device", "cpu"),
            dtype=options.get("dtype", "auto"),
            threads=settings.engine_threads,
            prefix_cache_entries=int(entries),
        )
    )


def _openai_engine(settings: Settings) -> Engine:
    from vlm2vla_server.engines.openai_engine import OpenAIEngine
    from vlm2vla_server.engines.openai_options import read_options

    adapters = tuple(name for name, _ in settings.adapters)
    options = read_options(dict(settings.engine_options), adapters, settings.require_model(), os.environ)
    return OpenAIEngine(options)


def _vllm_engine(settings: Settings) -> Engine:
    from vlm2vla_server.engines.vllm_engine import VLLMEngine
    from vlm2vla_server.engines.vllm_options import VLLMOptions

    if importlib.util.find_spec("vllm") is None:  # imported when the engine starts: it takes seconds
        raise ImportError(name="vllm")
    return VLLMEngine(
        VLLMOptions(
            model=settings.require_model(),
            adapters=settings.adapters,
            threads=settings.engine_threads,
            max_concurrency=settings.max_concurrency,
            engine_options=settings.engine_options,
        )
    )



def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM, or until the engine dies."""
    settings.require_model()
    service = Service(settings, build_engine(settings))
    serving.tune_process()
    log.info("serving on http://%s:%s (loading; GET /readyz says when it is done)", settings.host, settings.port)
    started = serving.run(build_app(service), service)
    if service.dead.is_set():
        return EXIT_ENGINE_DIED
    return EXIT_OK if started else EXIT_NOT_READY


async def _check(settings: Settings) -> int:
    service = Service(settings, build_engine(settings))
    try:
        await service.start()
        print(service.info().model_dump_json(indent=2))
        return EXIT_OK if service.ready else EXIT_NOT_READY
    finally:
        await service.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 fine, 1 not ready, 2 usage or configuration, 3 the engine died."""
    arguments = parser().parse_args(argv)
    try:
        settings = read_settings(arguments)
        logs.setup(settings.log_format)
        return serve(settings) if arguments.command == "serve" else asyncio.run(_check(settings))
    except ConfigurationError as problem:
        print(f"vlm2vla-server: {problem}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130
