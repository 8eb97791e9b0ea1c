"""What each command of ``vlm2vla-client`` does; argument parsing is in ``cli``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from vlm2vla_client import physical
from vlm2vla_client.ask import ask_both, live_frame
from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.cameras.choose import CameraOptions, open_camera
from vlm2vla_client.clock import SystemClock
from vlm2vla_client.commissioning import is_commissioned, restrain
from vlm2vla_client.config import (
    PHYSICAL_ROBOTS,
    ClientConfig,
    check_server_url,
    load_config,
    refuse_read_only,
    split_verifiers,
)
from vlm2vla_client.confirm import confirm_on_terminal
from vlm2vla_client.episode import EpisodeResult
from vlm2vla_client.errors import ConfigurationError, NotBuiltError, ProtocolMismatchError, RecordingError
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.live_rerun import open_live
from vlm2vla_client.operator_keys import operator_of_run
from vlm2vla_client.pictures import read_picture
from vlm2vla_client.policies.base import Policy, PolicyInfo
from vlm2vla_client.policies.baselines import BASELINES, open_baseline
from vlm2vla_client.policies.random import RandomPolicy
from vlm2vla_client.policies.server import ServerPolicy
from vlm2vla_client.progress import ConsoleProgress, Progress, SilentProgress, printable
from vlm2vla_client.recorder import new_episode_folder, plain
from vlm2vla_client.shadow import open_shadow
from vlm2vla_client.verifiers.chain import MEMBER_DEADLINE_S
from vlm2vla_client.verifiers.choose import make_chain
from vlm2vla_client.verifiers.outside import close_outside, open_outside
from vlm2vla_client.view import write_view
from vlm2vla_schema.images import encode_jpeg, to_base64
from vlm2vla_schema.messages import MAX_IMAGES, VqaResponse

VQA_DEADLINE_S = 60.0
READY_WAIT_S = 120.0
SIM_EXTRA = "the twin needs its simulator: pip install 'vlm2vla-client[sim]'"


def _progress(as_json: bool) -> Progress:
    return SilentProgress() if as_json else ConsoleProgress(Console(highlight=False, soft_wrap=True))


def connect(arguments: argparse.Namespace, config: ClientConfig) -> ServerConnection:
    """The connection that flags and configuration ask for."""
    url = check_server_url(arguments.server or config.server)
    return ServerConnection(url, api_key=arguments.api_key or config.api_key)


def refuse_untrained(info: PolicyInfo, physical: bool, allow_untrained: bool, confirm: bool) -> None:
    """A physical arm follows only a model that was trained to act, or a person who watches every chunk.

    Raises:
        ConfigurationError: it must not move.
    """
    if physical and not info.trained_to_act and not (allow_untrained and confirm):
        raise ConfigurationError(
            f"{info.name} was never trained to act (/info says policy false); a physical arm follows it only with "
            "--allow-untrained --confirm"
        )


def print_json(value: Any) -> None:
    """One object on one line of standard output."""
    print(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))


def _is_text(text: str) -> bool:
    """False for bytes of the command line that were no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_task(task: str) -> None:
    """Raises ConfigurationError when it is no task that a model could be asked."""
    if not task.strip() or len(task) > 2000 or not _is_text(task):
        raise ConfigurationError("--task must be 1..2000 characters of text")


def run(arguments: argparse.Namespace) -> int:
    """``run``: one episode, recorded, with its page and its animation."""
    config = load_config(arguments.config)
    robot = arguments.robot or ("twin" if arguments.sim else config.robot)
    camera = arguments.camera or ("twin" if arguments.sim else config.camera)
    verifiers = split_verifiers(arguments.verifier or ("server" if arguments.sim else config.verifier))
    refuse_read_only(robot)
    if robot == "replay":
        raise NotBuiltError("no run has the robot 'replay'; `vlm2vla-client replay EPISODE` moves a recording again")
    eye = camera_options(arguments, camera)
    check_task(arguments.task)
    if arguments.confirm and arguments.execute == "streamed":
        raise ConfigurationError("--confirm needs --execute whole: a chunk is confirmed before it starts")
    if arguments.shadow and arguments.execute == "streamed":
        raise ConfigurationError("--shadow needs --execute whole: the twin moves the whole chunk before the arm starts")
    if robot in PHYSICAL_ROBOTS:
        return _run_on_arm(arguments, config, robot, eye, verifiers)
    return _run_in_twin(arguments, config, verifiers, eye)


def camera_options(arguments: argparse.Namespace, name: str) -> CameraOptions | None:
    """The camera ``name`` with its flags; None for the twin's, which is made with its world.

    Raises:
        ConfigurationError: a flag of another camera beside the twin's.
    """
    flags = ("serial", "file", "device", "fps", "lock_exposure", "repeat")
    values = {flag: getattr(arguments, f"camera_{flag}") for flag in flags}
    if name != "twin":
        return CameraOptions(name, **values)
    if any(values.values()):
        raise ConfigurationError("a --camera-... flag was given, but the camera is the twin's: name one with --camera")
    return None


def _run_on_arm(
    arguments: argparse.Namespace,
    config: ClientConfig,
    robot: str,
    eye: CameraOptions | None,
    verifiers: tuple[str, ...],
) -> int:
    """A physical run: everything that can be refused is refused before the arm is touched."""
    if arguments.policy not in ("server", "random", *BASELINES):
        raise ConfigurationError(
            f"the policy {arguments.policy!r} needs the twin; a physical arm follows server or a baseline"
        )
    if eye is None:
        raise ConfigurationError(f"the robot {robot!r} needs a camera on its bench, not the twin's: see --camera")
    if eye.plays_recording and not arguments.dry_run:
        raise ConfigurationError(f"{eye.file} shows the past: no arm moves by it; add --dry-run, or --robot twin")
    operator = operator_of_run(arguments.hold_to_run)
    arm, arm_name = physical.make_robot(robot, config)
    limits = physical.physical_limits(config.limits)
    confirm, speed = restrain(arguments.confirm, arguments.speed, is_commissioned(robot, arm_name, limits))
    if (confirm, speed) != (arguments.confirm, arguments.speed):
        print(f"{robot} {arm_name} was never commissioned: --confirm --speed {speed:g} apply", file=sys.stderr)
    if confirm and arguments.execute == "streamed":
        raise ConfigurationError("--confirm needs --execute whole: a chunk is confirmed before it starts")
    shadow = open_shadow(limits, speed) if arguments.shadow else None
    live = open_live(arguments.rerun)
    outside = open_outside(verifiers, config.gemini, config.folder, consent=arguments.gemini_consent)
    connection, model = connect(arguments, config), arguments.model or config.model
    try:
        verifier = make_chain(verifiers, connection, model, outside)
        if arguments.policy not in BASELINES or "server" in verifiers:
            connection.wait_ready(READY_WAIT_S)
        policy = _policy_on_arm(arguments, connection, model)
        refuse_untrained(policy.info(), True, arguments.allow_untrained, arguments.confirm)
        request = physical.PhysicalRun(
            task=arguments.task,
            scenario=arguments.scenario or "out_of_distribution",
            seed=arguments.seed,
            execute=arguments.execute,
            speed=speed,
            max_cycles=arguments.max_cycles,
            dry_run=arguments.dry_run,
            confirm=confirm_on_terminal if confirm else None,
            operator=operator,
            shadow=shadow,
            verify_deadline_s=MEMBER_DEADLINE_S * len(verifiers),
            min_free_bytes=config.min_free_disk_mb << 20,
            live=live,
        )
        seen = open_camera(eye, SystemClock())
        return _recorded(
            arguments,
            lambda *place: physical.run_on_arm(request, arm, seen, policy, verifier, limits, *place),
        )
    finally:
        if live is not None:
            live.close()
        connection.close()
        close_outside(outside)


def _policy_on_arm(arguments: argparse.Namespace, connection: ServerConnection, model: str | None) -> Policy:
    if arguments.policy == "server":
        return ServerPolicy(connection, model=model)
    if arguments.policy == "random":
        return RandomPolicy(arguments.seed)
    return open_baseline(arguments.policy, arguments.policy_server, arguments.unnorm_key)


def _run_in_twin(
    arguments: argparse.Namespace, config: ClientConfig, verifiers: tuple[str, ...], eye: CameraOptions | None
) -> int:
    try:
        from vlm2vla_client.scenes import choose_scene
        from vlm2vla_client.sim import SimRequest, run_in_twin
    except ImportError as error:
        raise ConfigurationError(f"{SIM_EXTRA} ({error})") from None
    operator = operator_of_run(arguments.hold_to_run)
    choice = choose_scene(arguments.task, arguments.scene, arguments.seed, arguments.scenario)
    live = open_live(arguments.rerun)
    outside = open_outside(verifiers, config.gemini, config.folder, consent=arguments.gemini_consent)
    connection = connect(arguments, config)
    request = SimRequest(
        task=arguments.task,
        choice=choice,
        policy=arguments.policy,
        verifiers=verifiers,
        connection=connection,
        model=arguments.model or config.model,
        policy_server=arguments.policy_server,
        unnorm_key=arguments.unnorm_key,
        execute=arguments.execute,
        speed=arguments.speed,
        max_cycles=arguments.max_cycles,
        dry_run=arguments.dry_run,
        realtime=arguments.realtime,
        limits=config.limits if arguments.config is not None else {},
        confirm=confirm_on_terminal if arguments.confirm else None,
        operator=operator,
        shadow=arguments.shadow,
        outside=outside,
        camera=None if eye is None else open_camera(eye, SystemClock()),
        camera_name="twin" if eye is None else eye.name,
        min_free_bytes=config.min_free_disk_mb << 20,
        live=live,
    )
    try:
        return _recorded(arguments, lambda folder, progress: run_in_twin(request, folder, progress))
    finally:
        if live is not None:
            live.close()
        connection.close()
        close_outside(outside)


def _recorded(arguments: argparse.Namespace, episode: Callable[[Path, Progress], EpisodeResult]) -> int:
    """Runs an episode into a new folder, which goes again when nothing was recorded; reports it. The exit code."""
    folder = new_episode_folder(arguments.record, arguments.task)
    try:
        result = episode(folder, _progress(arguments.json))
    except BaseException:
        _remove_if_empty(folder)
        raise
    _report(arguments.json, result, folder)
    return result.exit_code


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # something was recorded: it stays


def _report(as_json: bool, result: EpisodeResult, folder: Path, **more: Any) -> None:
    page: Path | None = None
    try:
        page = write_view(folder)
    except RecordingError as error:  # the episode has its own exit code
        print(f"no view.html: {error}", file=sys.stderr)
    if as_json:
        animation = folder / "episode.gif"
        paths = {"folder": folder, "view": page, "animation": animation if animation.is_file() else None}
        print_json({**vars(result), **paths, **more})
        return
    if result.physics is not None:
        word = "success" if result.physics.get("success") else "no success"
        print(f"physics: {word}, {result.physics.get('score')} of {result.physics.get('max_score')}")
    print(f"{result.cycles} cycles, {result.rows_executed} rows, {result.seconds:.1f} s; recorded in {folder}")


def replay(arguments: argparse.Namespace) -> int:
    """``replay``: the recorded rows once more, in the recorded scene."""
    try:
        from vlm2vla_client.replay import replay_in_twin
        from vlm2vla_client.sim import SimRequest as _  # noqa: F401 - the simulator must be there before a folder is made
    except ImportError as error:
        raise ConfigurationError(f"{SIM_EXTRA} ({error})") from None
    folder = new_episode_folder(arguments.record, "replay")
    try:
        outcome = replay_in_twin(arguments.episode, folder, _progress(arguments.json), realtime=arguments.realtime)
    except BaseException:
        _remove_if_empty(folder)
        raise
    gap_m = outcome.largest_gap_m
    same = outcome.same_decisions
    _report(arguments.json, outcome.result, folder, steps=outcome.steps, largest_gap_m=gap_m, same_decisions=same)
    if not arguments.json:
        gap = "nothing moved" if gap_m is None else f"largest gap to the recorded path {1000 * gap_m:.1f} mm"
        print(f"{outcome.steps} rows, {gap}, decisions {'the same' if same else 'differ'}")
    return outcome.result.exit_code


def view(arguments: argparse.Namespace) -> int:
    """``view``: the episode as a page; prints where it is."""
    print(write_view(arguments.episode, arguments.out))
    return 0


def vqa(arguments: argparse.Namespace) -> int:
    """``vqa``: any question about any pictures, to the same model that drives the arm."""
    if len(arguments.image) > MAX_IMAGES:
        raise ConfigurationError(f"at most {MAX_IMAGES} images, received {len(arguments.image)}")
    if not 1 <= len(arguments.question) <= 2000:
        raise ConfigurationError("the question must be 1..2000 characters")
    config = load_config(None)
    fields: dict[str, Any] = {"question": arguments.question}
    if arguments.image:
        fields["images"] = [to_base64(encode_jpeg(read_picture(path))) for path in arguments.image]
    model = arguments.model or config.model
    if model is not None:
        fields["model"] = model
    connection = connect(arguments, config)
    try:
        answer = connection.post("/vqa", fields, {}, VQA_DEADLINE_S)
    finally:
        connection.close()
    try:
        text = VqaResponse.model_validate(answer).answer
    except ValidationError:
        raise ProtocolMismatchError("the server's answer to /vqa is not one", code="bad_answer") from None
    if arguments.json:
        print_json(answer)
    else:
        print(text)
    return 0


def ask(arguments: argparse.Namespace) -> int:
    """``ask``: the live frame, one question, two answers."""
    if not 1 <= len(arguments.question) <= 2000 or not _is_text(arguments.question):
        raise ConfigurationError("the question must be 1..2000 characters of text")
    config = load_config(arguments.config)
    name = arguments.camera or ("twin" if arguments.sim else config.camera)
    options = camera_options(arguments, name)
    camera = _twin_camera(arguments.seed) if options is None else open_camera(options, SystemClock())
    connection = connect(arguments, config)
    try:
        frame = live_frame(camera)
        answers = ask_both(connection, frame, arguments.question, arguments.model or config.model)
    finally:
        connection.close()
    if arguments.json:
        print_json({"camera": name, "question": arguments.question, "answers": answers})
        return 0
    width = max(len(model) for model in answers)
    for model, answer in answers.items():
        print(f"{model:<{width}}  {printable(answer)}")
    return 0


def _twin_camera(seed: int) -> Camera:
    """The twin's view of its kitchen."""
    try:
        from vlm2vla_client.cameras.twin import TwinCamera
        from vlm2vla_client.robots.twin import TwinClock
        from vlm2vla_client.scenes import choose_scene
        from vlm2vla_twin.physics import World
    except ImportError as error:
        raise ConfigurationError(f"{SIM_EXTRA} ({error})") from None
    world = World(choose_scene("", None, seed).spec)
    return TwinCamera(world, TwinClock(world))


def evaluate(arguments: argparse.Namespace) -> int:
    """``eval``: hands over to the evaluation package."""
    try:
        from vlm2vla_client.evaluation.cli import main
    except ImportError as error:
        raise ConfigurationError(f"{SIM_EXTRA} ({error})") from None
    return int(main(arguments.rest))


def bench(arguments: argparse.Namespace) -> int:
    """``bench``: times a server, compares two, or computes the physical limit."""
    from vlm2vla_client.bench.cli import main

    return main(arguments, print_json)
