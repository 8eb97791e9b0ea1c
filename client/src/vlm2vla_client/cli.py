"""``vlm2vla-client``: the command line of the robot PC.

Exit codes: 0 all subtasks verified (with verifier ``none``: all executed), 2 usage or configuration, 3 not completed,
4 server, 5 safety stop, 6 camera, 7 robot, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from vlm2vla_client import calibrate, commands, configure, doctor, home, teleop
from vlm2vla_client.bench import options as bench_options
from vlm2vla_client.config import CAMERAS, POLICIES, ROBOTS, VERIFIERS
from vlm2vla_client.errors import ClientError
from vlm2vla_client.live_rerun import VIEWER
from vlm2vla_client.operator_bench import speed
from vlm2vla_client.progress import printable

INTERRUPTED = 130
DEVELOPMENT_SEED = 500_000  # below lie the seeds of training, from 1,000,000 on those of tests


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--server", metavar="URL", help="where vlm2vla-server answers (default http://127.0.0.1:8000)")
    group.add_argument("--api-key", metavar="KEY", help="sent as a bearer token (or set VLM2VLA_API_KEY)")
    group.add_argument("--model", metavar="NAME", help="adapter to ask, or 'base' (default: the server's first)")


def add_camera(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a camera; ``commands.camera_options`` reads them."""
    group = parser.add_argument_group("camera")
    group.add_argument("--camera", choices=CAMERAS, help="default realsense, or client.toml")
    group.add_argument("--camera-serial", metavar="N", help="realsense: which one, when several are connected")
    group.add_argument("--camera-file", type=Path, metavar="F", help="video file, folder of pictures, .db3 or .bag")
    group.add_argument("--camera-device", type=Path, metavar="F", help="v4l2: such as /dev/video0 (the default)")
    group.add_argument("--camera-fps", type=_rate, metavar="F", help="images: pictures a second (default 5)")
    group.add_argument("--camera-lock-exposure", action="store_true", help="realsense: fix it after the warm-up")
    group.add_argument("--camera-repeat", action="store_true", help="a recording begins anew at its end")


def _add_run(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = subparsers.add_parser("run", help="do a task", description="Does a task and records the episode.")
    run.add_argument("--task", required=True, metavar="TEXT", help='such as "pick up the carrot"')
    run.add_argument("--sim", action="store_true", help="the twin's robot and camera, the server's verifier")
    run.add_argument("--config", type=Path, metavar="FILE", help="client.toml (default: the user's config folder)")
    run.add_argument("--robot", choices=ROBOTS, help="default widowx, or client.toml")
    add_camera(run)
    run.add_argument("--verifier", metavar="NAMES", help=f"one of {', '.join(VERIFIERS)}, or a chain: gemini,human")
    run.add_argument("--gemini-consent", action="store_true", help="send pictures of the bench to Google, this run")
    run.add_argument("--policy", choices=POLICIES, default="server")
    run.add_argument("--policy-server", metavar="URL", help="openvla, ecot, molmoact, openpi: the model's own server")
    run.add_argument("--unnorm-key", metavar="NAME", help="openvla, ecot: statistics of the actions (bridge_orig)")
    run.add_argument("--scenario", choices=("in_distribution", "out_of_distribution"), help="sampling of the subtasks")
    run.add_argument("--scene", metavar="NAME", help="twin: a suite's scene, or 'kitchen' (default: the task's)")
    run.add_argument("--seed", type=_seed, default=DEVELOPMENT_SEED, metavar="N", help="scene and sampling (500000)")
    run.add_argument("--record", type=Path, default=Path("runs"), metavar="DIR", help="default ./runs")
    run.add_argument("--max-cycles", type=_natural, default=30, metavar="N", help="in all; 0: until done (default 30)")
    run.add_argument("--execute", choices=("whole", "streamed"), default="whole")
    run.add_argument("--speed", type=speed, default=1.0, metavar="F", help="share of the speed limit, 0..1")
    run.add_argument("--realtime", action="store_true", help="twin: let simulated seconds take as long as they say")
    run.add_argument("--dry-run", action="store_true", help="ask and check, but do not move")
    run.add_argument("--confirm", action="store_true", help="ask before every chunk")
    run.add_argument("--shadow", action="store_true", help="the twin moves each chunk first, to foresee contact")
    run.add_argument("--hold-to-run", action="store_true", help="the arm moves only while SPACE is held down")
    run.add_argument("--rerun", nargs="?", const=VIEWER, metavar="WHERE", help="show it live in Rerun (see operate.md)")
    run.add_argument("--allow-untrained", action="store_true", help="with --confirm: a policy never trained to act")
    run.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
    _add_server(run)
    run.set_defaults(command=commands.run)


def _add_others(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    replay = subparsers.add_parser("replay", help="move a recorded episode of the twin again")
    replay.add_argument("episode", type=Path)
    replay.add_argument("--record", type=Path, default=Path("runs"), metavar="DIR", help="default ./runs")
    replay.add_argument("--realtime", action="store_true")
    replay.add_argument("--json", action="store_true")
    replay.set_defaults(command=commands.replay)

    view = subparsers.add_parser("view", help="write an episode as one HTML page")
    view.add_argument("episode", type=Path)
    view.add_argument("--out", type=Path, metavar="FILE", help="default: view.html in the episode's folder")
    view.set_defaults(command=commands.view)

    vqa = subparsers.add_parser("vqa", help="ask the model about pictures")
    vqa.add_argument("--image", type=Path, action="append", default=[], metavar="F", help="up to 8; may be left out")
    vqa.add_argument("question")
    vqa.add_argument("--json", action="store_true", help="the whole answer as one JSON object")
    _add_server(vqa)
    vqa.set_defaults(command=commands.vqa)

    ask = subparsers.add_parser("ask", help="ask base model and adapter about the live frame, side by side")
    ask.add_argument("question")
    ask.add_argument("--sim", action="store_true", help="the twin's camera")
    ask.add_argument("--seed", type=_seed, default=DEVELOPMENT_SEED, metavar="N", help="twin: scene (500000)")
    ask.add_argument("--config", type=Path, metavar="FILE", help="client.toml (default: the user's config folder)")
    ask.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
    add_camera(ask)
    _add_server(ask)
    ask.set_defaults(command=commands.ask)

    bench = subparsers.add_parser(
        "bench",
        help="time a server, beside another one and beside the physical limit",
        description="Times requests, part by part, of 1, 2, 4 and 8 robots at once. With --floor and without --server: "
        "computes the shortest possible cycle of a model on a machine.",
    )
    bench_options.add_arguments(bench)
    _add_server(bench)
    bench.set_defaults(command=commands.bench)

    _add_setting_up(subparsers)

    evaluate = subparsers.add_parser("eval", help="measure a policy on a suite of the twin", add_help=False)
    evaluate.set_defaults(command=commands.evaluate)


def _add_setting_up(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    settings = subparsers.add_parser("configure", help="write client.toml and limits.toml, by flags or by questions")
    configure.add_arguments(settings)
    settings.set_defaults(command=configure.configure)

    start = subparsers.add_parser("home", help="move the arm to its start pose, slowly, through the same filter")
    home.add_arguments(start)
    start.set_defaults(command=home.home)

    touch = subparsers.add_parser("calibrate", help="touch the counter at three points and write limits.toml")
    calibrate.add_arguments(touch)
    touch.set_defaults(command=calibrate.calibrate)

    drive = subparsers.add_parser("teleop", help="move the arm by the keyboard, recorded as an episode to learn from")
    teleop.add_arguments(drive)
    add_camera(drive)
    drive.set_defaults(command=teleop.teleop)

    check = subparsers.add_parser("doctor", help="check server, camera, arm, verifier and limits; name every remedy")
    doctor.add_arguments(check)
    check.set_defaults(command=doctor.doctor)


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, received {value}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"expected 0..{2**31 - 1}, received {value}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1000.0:
        raise argparse.ArgumentTypeError(f"expected above 0 to 1000, received {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="vlm2vla-client",
        description="The robot PC of VLM2VLA: sends frames, checks every number that comes back, moves the arm.",
        epilog="exit codes: 0 all subtasks verified, 2 usage or configuration, 3 not completed, 4 server, "
        "5 safety stop, 6 camera, 7 robot, 130 interrupted",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(subparsers)
    _add_others(subparsers)
    return parser


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; prints errors in one line, without a traceback."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is commands.evaluate:
        arguments.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.suppress(ValueError):  # not the main thread: whoever embeds us handles signals
        signal.signal(signal.SIGTERM, _terminated)
        # A program started in the background inherits an ignored SIGINT; one that moves an arm must still stop.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ClientError as error:
        print(f"vlm2vla-client: {printable(str(error))}", file=sys.stderr)
        if getattr(arguments, "json", False):
            commands.print_json({"exit_code": error.exit_code, "outcome": "not_started", "message": str(error)})
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
