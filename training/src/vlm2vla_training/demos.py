"""`demos`: scripted demonstrations in the twin, written as an episode dataset; the simulator's truth goes to a file of
its own (truth.jsonl) that `annotate` never opens.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm2vla_schema.images import encode_jpeg
from vlm2vla_training.attempts import Attempts
from vlm2vla_training.demo_scenes import SUITES, DemoTask, demo_task
from vlm2vla_training.demonstrator import STEP_S, Demonstrator, Policy, Style, execute
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import JsonlAppender, read_jsonl
from vlm2vla_training.progress import finish, track
from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import UnreachableError, World
from vlm2vla_twin.skills import title
from vlm2vla_twin.truth import observe

TRUTH_FILE = "truth.jsonl"
FAILED_FILE = "failed.jsonl"
_MAX_STEPS = 250
_REST_S = 1.0
_LIFTED_M = 0.05


@dataclass(frozen=True)
class Job:
    """What one worker needs to record one episode."""

    suite: str
    seed: int
    mode: str
    width: int
    height: int
    style: Style
    policy: str | None = None

    @property
    def key(self) -> str:
        """Episode key."""
        return f"twin/{self.suite}/{self.seed}"


@dataclass(frozen=True)
class Demo:
    """A recorded episode, and the truth of each step as JSON objects."""

    episode: Episode
    truth: list[dict[str, Any]]
    success: bool


def run_demos(args: argparse.Namespace) -> int:
    """`demos`: record; resumes behind the last whole part."""
    started = time.monotonic()
    style = Style(args.speed_m, args.aim_m, args.misjudge, args.residual_m, args.miss)
    jobs = [
        Job(suite, seed, args.mode, args.width, args.height, style, args.policy)
        for suite in args.suite
        for seed in range(args.seed, args.seed + args.episodes)
    ]
    for job in (jobs[0], jobs[-1]):
        demo_task(job.suite, job.seed, job.mode)
    if args.dry_run:
        print(f"demos: would record {len(jobs)} episodes of {', '.join(args.suite)} into {args.out}")
        return 0
    with (
        EpisodeWriter(args.out) as writer,
        JsonlAppender(args.out / TRUTH_FILE) as truth,
        JsonlAppender(args.out / FAILED_FILE) as failures,
    ):
        failed = {line["episode_key"] for line in read_jsonl(args.out / FAILED_FILE)}
        left = [job for job in jobs if job.key not in writer.done and job.key not in failed]
        for job, demo in track(zip(left, _recorded(left, args.workers), strict=True), len(left), "demos"):
            if demo is None or not (demo.success or args.keep_failures):
                failures.append({"episode_key": job.key})
                failed.add(job.key)
                continue
            truth.append({"episode_key": job.key, "success": demo.success, "steps": demo.truth})
            writer.write(demo.episode)
        written = len(writer.done)
    if not written:
        raise DataError(f"none of {len(jobs)} demonstrations succeeded; nothing was written")
    summary = {
        "suites": args.suite,
        "first_seed": args.seed,
        "episodes": written,
        "failed": len(failed),
        "mode": args.mode,
        "style": vars(style),
        "first_attempts_by": "policy" if args.policy else "demonstrator",
        "source": "twin",
    }
    finish("demos", args.out, summary, started, f"{written} episodes, {len(failed)} failed and left out")
    return 0


def _recorded(jobs: list[Job], workers: int) -> Iterator[Demo | None]:
    if workers <= 1:
        yield from map(record, jobs)
        return
    # A fresh interpreter for each worker: an OpenGL context does not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(record, jobs)


def record(job: Job) -> Demo | None:
    """Record one demonstration; None when the arm could not reach a goal or the run took too long."""
    task = demo_task(job.suite, job.seed, job.mode)
    random = np.random.default_rng([job.seed, sorted(SUITES).index(job.suite), 1])
    try:
        world = World(task.spec)
        camera = Camera(world, job.width, job.height)
        if job.policy is None:
            return _run(job, task, world, camera, random)
        with closing(Attempts(job.policy, job.seed)) as attempts:
            return _run(job, task, world, camera, random, _policy(attempts, camera))
    except UnreachableError:
        return None


def _policy(attempts: Attempts, camera: Camera) -> Policy:
    return lambda skill: attempts.rows(encode_jpeg(camera.rgb()), title(skill))


def _run(
    job: Job, task: DemoTask, world: World, camera: Camera, random: np.random.Generator, policy: Policy | None = None
) -> Demo | None:
    demonstrator = Demonstrator(world, task.goals, random, job.style, policy)
    images: list[bytes] = []
    actions: list[list[float]] = []
    states: list[list[float]] = []
    truth: list[dict[str, Any]] = []
    for row in demonstrator.rows():
        if len(actions) >= _MAX_STEPS:
            return None
        images.append(encode_jpeg(camera.rgb()))
        states.append(_state(world))
        truth.append(observe(world).as_dict())
        actions.append([*row[:3], 0.0, 0.0, 0.0, row[3]])
        execute(world, demonstrator.goal_m, row[3])
    for _ in range(round(_REST_S / STEP_S)):
        execute(world, demonstrator.goal_m, actions[-1][6])
    facts = {"suite": job.suite, "seed": job.seed, "mode": job.mode}
    episode = Episode(job.key, task.instruction, "twin", images, np.array(actions), np.array(states), 0, facts)
    return Demo(episode, truth, succeeded(world, task))


def _state(world: World) -> list[float]:
    """[x_m, y_m, z_m, roll_rad, pitch_rad, yaw_rad, gripper opening]; angles of the rotation's x-y-z Euler form."""
    pose = world.ee_pose()
    matrix = pose.rotation
    pitch = float(np.arcsin(np.clip(-matrix[2, 0], -1.0, 1.0)))
    roll = float(np.arctan2(matrix[2, 1], matrix[2, 2]))
    yaw = float(np.arctan2(matrix[1, 0], matrix[0, 0]))
    return [*(float(value) for value in pose.position_m), roll, pitch, yaw, world.gripper_fraction()]


def succeeded(world: World, task: DemoTask) -> bool:
    """Judge by physics: lifted objects hang 5 cm above rest in the gripper, placed ones lie in their target, let go."""
    for goal in task.goals:
        if goal.target is None:
            start = task.spec.object(goal.object).position_m[2]
            height = float(world.object_pose(goal.object)[0][2])
            if not world.grasped(goal.object) or height < start + _LIFTED_M:
                return False
        elif world.touching(goal.object) or not world.inside(goal.object, goal.target):
            return False
    return True
