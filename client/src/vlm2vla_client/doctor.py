"""``vlm2vla-client doctor``: looks at everything a run needs, and names what mends each missing part.

It moves nothing, but with ``--commission``, which is `commission.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm2vla_client.commands import print_json
from vlm2vla_client.commission import commission
from vlm2vla_client.commissioning import UNCOMMISSIONED_SPEED, is_commissioned
from vlm2vla_client.config import (
    CAMERAS,
    LIMITS_FILE,
    PHYSICAL_ROBOTS,
    ROBOTS,
    ClientConfig,
    check_server_url,
    default_path,
    load_config,
    split_verifiers,
)
from vlm2vla_client.doctor_machine import Finding, camera_findings, disk_findings, robot_findings
from vlm2vla_client.errors import ClientError, ConfigurationError
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.physical import make_robot, physical_limits
from vlm2vla_client.policies.server import ServerPolicy
from vlm2vla_client.progress import printable
from vlm2vla_client.recorder import plain
from vlm2vla_client.verifiers.gemini import GeminiVerifier
from vlm2vla_client.verifiers.gemini_settings import GeminiSettings, account, has_consented

SERVER_TIMEOUT_S = 5.0
GOOGLE_TIMEOUT_S = 15.0
MISSING = 2


@dataclass(frozen=True)
class Wanted:
    """What the run that is being checked would use."""

    config: ClientConfig
    server: str
    robot: str
    camera: str
    verifiers: tuple[str, ...]
    record: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same names as those of ``run``."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="client.toml (default: the user's config folder)")
    parser.add_argument("--sim", action="store_true", help="check what `run --sim` needs")
    parser.add_argument("--server", metavar="URL")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--robot", choices=ROBOTS)
    parser.add_argument("--camera", choices=CAMERAS)
    parser.add_argument("--verifier", metavar="NAMES")
    parser.add_argument("--record", type=Path, default=Path("runs"), metavar="DIR", help="default ./runs")
    parser.add_argument("--commission", action="store_true", help="the arm moves, a person confirms each step")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def doctor(arguments: argparse.Namespace) -> int:
    """Prints every finding; 0 when nothing is missing, else 2. With ``--commission``: see there."""
    if arguments.commission:
        return commission(arguments)
    findings = examine(arguments)
    missing = [finding for finding in findings if not finding.good]
    if arguments.json:
        print_json({"exit_code": MISSING if missing else 0, "findings": plain(findings)})
    else:
        for finding in findings:
            print(_lines(finding))
        print(f"\n{len(findings)} checks, {len(missing)} missing" if missing else f"\n{len(findings)} checks, all good")
    return MISSING if missing else 0


def _lines(finding: Finding) -> str:
    head = f"{'ok     ' if finding.good else 'MISSING'}  {finding.what:<20} {printable(finding.found)}"
    return head if finding.good else f"{head}\n{'':<9}-> {finding.remedy}"


def examine(arguments: argparse.Namespace) -> list[Finding]:
    """Everything, in the order in which it should be mended."""
    try:
        config, findings = load_config(arguments.config), []
    except ConfigurationError as error:
        config = ClientConfig()
        findings = [Finding("configuration", False, str(error), "correct that line, or: vlm2vla-client configure")]
    else:
        findings = [_about_file(config, arguments.sim)]
    wanted = _wanted(arguments, config)
    if wanted.robot in PHYSICAL_ROBOTS:
        findings.append(_about_limits(config))
        findings += _about_commissioning(wanted)
    findings += _about_server(wanted, arguments.api_key or config.api_key)
    checks: list[Callable[[], list[Finding]]] = [
        lambda: camera_findings(wanted.camera),
        lambda: robot_findings(wanted.robot, config.arms.get(wanted.robot, {})),
        lambda: _about_verifiers(wanted),
        lambda: disk_findings(wanted.record),
    ]
    for check in checks:
        findings += check()
    return findings


def _wanted(arguments: argparse.Namespace, config: ClientConfig) -> Wanted:
    sim = arguments.sim
    return Wanted(
        config=config,
        server=check_server_url(arguments.server or config.server),
        robot=arguments.robot or ("twin" if sim else config.robot),
        camera=arguments.camera or ("twin" if sim else config.camera),
        verifiers=split_verifiers(arguments.verifier or ("server" if sim else config.verifier)),
        record=arguments.record,
    )


def _about_file(config: ClientConfig, sim: bool) -> Finding:
    if config.path is not None:
        return Finding("configuration", True, str(config.path))
    if sim:
        return Finding("configuration", True, "defaults; --sim needs no client.toml")
    return Finding("configuration", False, f"no {default_path()}", "vlm2vla-client configure")


def _about_limits(config: ClientConfig) -> Finding:
    missing = [name for name in ("counter_z_m", "wall_x_m") if name not in config.limits]
    where = config.folder / LIMITS_FILE
    if missing:
        flags = " ".join(f"--{name.replace('_', '-')} METRES" for name in missing)
        remedy = f"vlm2vla-client calibrate; or measure on the bench, then: vlm2vla-client configure {flags}"
        return Finding("limits", False, f"{', '.join(missing)} not in {where}", remedy)
    values = ", ".join(f"{name} {config.limits[name]}" for name in ("counter_z_m", "wall_x_m"))
    return Finding("limits", True, values)


def _about_commissioning(wanted: Wanted) -> list[Finding]:
    """Whether a person has confirmed this arm; nothing before its limits are known, which come first."""
    try:
        limits = physical_limits(wanted.config.limits)
        arm = make_robot(wanted.robot, wanted.config)[1]
    except ConfigurationError:
        return []
    done = is_commissioned(wanted.robot, arm, limits)
    until = f"no: until then a run has --confirm --speed {UNCOMMISSIONED_SPEED:g}"
    return [Finding("commissioned", done, arm if done else until, "vlm2vla-client doctor --commission")]


def _about_server(wanted: Wanted, key: str | None) -> list[Finding]:
    connection = ServerConnection(wanted.server, api_key=key)
    start = "on the GPU box: vlm2vla-server serve; here: vlm2vla-client configure --server URL"
    try:
        if not connection.healthy(SERVER_TIMEOUT_S):
            return [Finding("server", False, f"nobody answers at {wanted.server}", start)]
        info = ServerPolicy(connection, model=wanted.config.model).info()
    except ClientError as error:
        remedy = "set VLM2VLA_API_KEY" if "unauthorized" in str(error) else "install the same version on both machines"
        return [Finding("server", False, str(error), remedy)]
    finally:
        connection.close()
    findings = [Finding("server", True, f"{wanted.server}, model {info.name}")]
    if wanted.robot != "twin":
        remedy = "serve an adapter whose model card says policy, or run with --allow-untrained --confirm"
        word = "trained to act" if info.trained_to_act else "never trained to act (/info says policy false)"
        findings.append(Finding("policy", info.trained_to_act, f"{info.name} was {word}", remedy))
    return findings


def _about_verifiers(wanted: Wanted) -> list[Finding]:
    findings: list[Finding] = []
    if "gemini" in wanted.verifiers:
        findings += _about_gemini(wanted.config.gemini, wanted.config.folder)
    if "human" in wanted.verifiers:
        remedy = "start the run from a terminal, not from a pipe or a service"
        here = sys.stdin.isatty()
        findings.append(Finding("verifier human", here, "a terminal" if here else "no terminal here", remedy))
    if "twin" in wanted.verifiers and wanted.robot != "twin":
        remedy = "vlm2vla-client configure --verifier gemini"
        findings.append(Finding("verifier twin", False, "asks the simulator, and there is none", remedy))
    return findings


def _about_gemini(settings: GeminiSettings, folder: Path) -> list[Finding]:
    consented = has_consented(folder)
    remedy = "vlm2vla-client configure --gemini-consent (pictures of the bench then go to Google)"
    word = "recorded" if consented else "nobody has consented to send pictures to Google"
    findings = [Finding("gemini consent", consented, word, remedy)]
    priced = settings.model in settings.prices
    table = f'[gemini.prices."{settings.model}"] with input_usd and output_usd per million tokens in client.toml'
    word = "known" if priced else f"unknown, only tokens are counted; add {table}"
    findings.append(Finding("gemini price", True, word))
    try:
        verifier = GeminiVerifier(settings)
    except ConfigurationError as error:
        text = str(error)
        remedy = "pip install 'vlm2vla-client[gemini]'" if "pip install" in text else "export GEMINI_API_KEY=..."
        return [*findings, Finding("gemini", False, text, remedy)]
    try:
        problem = verifier.problem(GOOGLE_TIMEOUT_S)
    finally:
        verifier.close()
    remedy = "check the key, the model's name and the way to the internet; or --verifier server,human"
    found = f"{settings.model} at {account(settings)}" if problem is None else problem
    return [*findings, Finding("gemini", problem is None, found, remedy)]
