"""``vlm2vla-client bench``: time a server, compare two, or compute the physical limit."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.bench.floor import (
    A100,
    DEVICES,
    PAPER_CYCLE,
    PAPER_CYCLE_S,
    Device,
    Generation,
    floor_of,
    with_bits,
)
from vlm2vla_client.bench.plot import write_plot
from vlm2vla_client.bench.probe import Pictures, Question
from vlm2vla_client.bench.report import (
    FORMAT,
    about_server,
    floor_figures,
    floor_line,
    level_figures,
    lines_of,
    shape_figures,
    summary_line,
)
from vlm2vla_client.bench.run import WARM_UP, Target, measure, warm_up
from vlm2vla_client.bench.shape import ModelShape, read_shape
from vlm2vla_client.config import ClientConfig, check_server_url, load_config
from vlm2vla_client.errors import ConfigurationError, ServerUnreachableError
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.machine import about_machine, current_commit
from vlm2vla_client.pictures import read_picture
from vlm2vla_client.policies.server import ServerPolicy
from vlm2vla_client.recorder import write_json_atomic

READY_WAIT_S = 120.0
TELL_EVERY_S = 2.0
SCENE_SEED = 500_000  # a development seed


def main(arguments: argparse.Namespace, say_json: Callable[[Any], None]) -> int:
    """Runs the bench and returns 0 when every server answered at least once at every number of robots.

    Raises:
        ClientError: wrong usage, or a server that cannot be measured.
    """
    if arguments.requests < 1:
        raise ConfigurationError("--requests must be at least 1")
    floor = _floor(arguments)
    if floor is not None and arguments.server is None:
        return _floor_alone(arguments, *floor, say_json)
    config = load_config(None)
    pictures = Pictures(_picture(arguments.image))
    targets, servers = _targets(arguments, config)
    warm_up(targets, pictures)
    progress, levels, seed = _Progress(), [], WARM_UP
    for robots in arguments.robots:
        level = measure(targets, pictures, robots, arguments.requests, seed, progress)
        levels.append(level_figures(level, floor))
        seed += robots * arguments.requests
    report = {
        "format": FORMAT,
        "endpoint": arguments.endpoint,
        "requests_per_robot": arguments.requests,
        "servers": servers,
        "picture": "twin" if arguments.image is None else arguments.image.name,
        "paper_cycle_s": PAPER_CYCLE_S,
        "floor_model": None if floor is None else shape_figures(*floor),
        "levels": levels,
        "commit": current_commit(),
        "client_machine": about_machine(),
    }
    _publish(report, arguments, say_json)
    if any(figures["wall_ms"] is None for level in levels for figures in level["servers"].values()):
        raise ServerUnreachableError("a server answered no request at one number of robots", code="no_answer")
    return 0


def _publish(report: dict[str, Any], arguments: argparse.Namespace, say_json: Callable[[Any], None]) -> None:
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(arguments.out / "bench.json", report)
        write_plot(arguments.out / "bench.svg", report)
    if arguments.json:
        say_json(report)
        return
    for line in lines_of(report):
        print(line)
    print(summary_line(report))
    if arguments.out is not None:
        print(f"written: {arguments.out / 'bench.json'}, {arguments.out / 'bench.svg'}")


def _targets(arguments: argparse.Namespace, config: ClientConfig) -> tuple[list[Target], dict[str, Any]]:
    """The servers, waited for and asked who they are."""
    urls = [check_server_url(arguments.server or config.server)]
    if arguments.compare is not None:
        urls.append(check_server_url(arguments.compare))
    model, key = arguments.model or config.model, arguments.api_key or config.api_key
    targets, servers = [], {}
    for name, url in zip(("first", "second"), urls, strict=False):

        def connect(url: str = url) -> ServerConnection:
            return ServerConnection(url, api_key=key)

        connection = connect()
        try:
            connection.wait_ready(READY_WAIT_S)
            info = ServerPolicy(connection, model=model).info()
        finally:
            connection.close()
        question = Question(
            arguments.endpoint, arguments.subtask, arguments.task, model, plans="motion_plan" in info.stages
        )
        targets.append(Target(name, connect, question))
        servers[name] = {"url": url, **about_server(info)}
    return targets, servers


def _picture(path: Path | None) -> NDArray[np.uint8]:
    if path is not None:
        return read_picture(path)
    try:
        from vlm2vla_client.scenes import choose_scene
        from vlm2vla_twin.camera import Camera
        from vlm2vla_twin.physics import World
    except ImportError as error:
        raise ConfigurationError(
            f"the twin's picture needs its simulator: pip install 'vlm2vla-client[sim]', or give --image FILE ({error})"
        ) from None
    return Camera(World(choose_scene("pick up the carrot", None, SCENE_SEED).spec)).rgb()


def _floor(arguments: argparse.Namespace) -> tuple[ModelShape, Device] | None:
    if arguments.floor is None:
        return None
    device = DEVICES.get(arguments.device or "")
    if arguments.bandwidth_gb_s is not None and arguments.tflops is not None:
        device = Device(arguments.device or "this machine", arguments.bandwidth_gb_s, arguments.tflops)
    if device is None:
        raise ConfigurationError(f"--floor needs --device ({', '.join(DEVICES)}), or --bandwidth-gb-s and --tflops")
    if min(arguments.plan_tokens, arguments.action_tokens) < 1:
        raise ConfigurationError("--plan-tokens and --action-tokens must be at least 1")
    return read_shape(arguments.floor), with_bits(device, arguments.weight_bits)


def _floor_alone(
    arguments: argparse.Namespace, shape: ModelShape, device: Device, say_json: Callable[[Any], None]
) -> int:
    plan, rows = PAPER_CYCLE
    # The rows' prompt holds the plan.
    longer = arguments.plan_tokens - plan.generated
    work = (
        Generation(plan.prompt, arguments.plan_tokens),
        Generation(rows.prompt + longer, arguments.action_tokens, rows.cached, rows.pictures),
    )
    levels = [floor_figures(shape, device, work, robots, None) for robots in arguments.robots]
    model = shape_figures(shape, device)
    here, a100 = (PAPER_CYCLE_S * 1000.0 / floor_of(shape, machine, work).cycle_ms for machine in (device, A100))
    report = {"format": FORMAT, "floor_model": model, "floors": levels, "paper_cycle_s": PAPER_CYCLE_S}
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(arguments.out / "floor.json", report)
    if arguments.json:
        say_json(report)
        return 0
    print(
        f"{model['name']}: {shape.parameters / 1e9:.2f} billion parameters, {model['weights_gb']:.2f} GB read a token "
        f"at {model['weight_bits']} bits, {model['kv_bytes_per_token'] / 1024:.0f} KiB of cache a token"
    )
    for level in levels:
        print(f"{level['robots']:>3} robot{'s' * (level['robots'] > 1):<1}  {floor_line(level)}")
    paper = f"{PAPER_CYCLE_S} s on an A100"
    print(f"the paper's cycle, {paper}: {a100:.1f} times an A100's floor, {here:.1f} times this one")
    return 0


class _Progress:
    """Lines on standard error, now and then and at the end of each number of robots."""

    def __init__(self) -> None:
        self._told_s = time.monotonic()

    def __call__(self, robots: int, done: int, wanted: int) -> None:
        if done < wanted and time.monotonic() - self._told_s < TELL_EVERY_S:
            return
        self._told_s = time.monotonic()
        print(f"{robots} robot{'s' * (robots > 1)}: {done}/{wanted} requests", file=sys.stderr, flush=True)
