"""The live view in Rerun (`--rerun`, extra ``rerun``): pictures, words, the filter's decisions, and the arm in 3D.

Entities: ``camera``; ``words`` (task, subtasks, plans), ``safety``, ``shadow``, ``verdict`` and ``events`` as text
logs; ``arm/end_effector``, ``arm/path/N`` (cycle N), ``arm/rows`` (one arrow a row, coloured by the filter);
``limits``. Timelines: ``run`` (seconds from its first event) and ``cycle``. Metres in the robot's base frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.live import LiveView, Sink

VIEWER: Final = "viewer"
FLUSH_S: Final = 2.0
WAITING, GREEN, YELLOW, RED = (150, 150, 150), (60, 180, 90), (235, 180, 40), (220, 60, 50)
COLOURS: Final = {"pass": GREEN, "clip": YELLOW, "refuse": RED}
LEVELS: Final = {"pass": "INFO", "clip": "WARN", "refuse": "ERROR"}
#: Events that are told in one line each: the field that says it, and how grave it is.
TOLD: Final = {
    "dropped": ("reason", "WARN"),
    "not_started": ("reason", "WARN"),
    "hold": ("reason", "WARN"),
    "fault": ("reason", "ERROR"),
    "error": ("message", "ERROR"),
    "end": ("message", "INFO"),
}


def open_live(where: str | None) -> LiveView | None:
    """The live view that ``--rerun`` asks for; None without it.

    Args:
        where: ``viewer`` for a window on this screen, ``FILE.rrd`` to write one, or ``rerun+http://HOST:PORT/proxy``.

    Raises:
        ConfigurationError: another ``where``, or Rerun is not installed; names the extra.
    """
    if where is None:
        return None
    if where != VIEWER and not where.endswith(".rrd") and not where.startswith(("rerun+http://", "rerun+https://")):
        raise ConfigurationError(f"--rerun: expected nothing, FILE.rrd or rerun+http://HOST:PORT/proxy, got {where!r}")
    try:
        import rerun
    except ImportError as error:
        raise ConfigurationError(f"--rerun needs its viewer: pip install 'vlm2vla-client[rerun]' ({error})") from None
    return LiveView(lambda: open_sink(rerun, where))


def open_sink(rerun: Any, where: str) -> Sink:
    """Connects; blocks for seconds where nobody answers."""
    recording = rerun.RecordingStream("vlm2vla")
    if where == VIEWER:
        recording.spawn(hide_welcome_screen=True)
    elif where.endswith(".rrd"):
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        recording.save(where)
    else:
        recording.connect_grpc(where)
    return RerunSink(rerun, recording)


class RerunSink:
    """One run in one Rerun recording. Raises whatever Rerun raises."""

    def __init__(self, rerun: Any, recording: Any) -> None:
        self._rerun, self._recording = rerun, recording
        self._first_s: float | None = None
        self._cycle = 0
        self._start_m: list[float] | None = None
        self._rows: list[list[float]] = []
        self._colours: list[tuple[int, int, int]] = []
        self._path: list[list[float]] = []
        self._shown: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "episode": self._on_episode,
            "limits": self._on_limits,
            "request": self._on_request,
            "subtasks": lambda line: self._say("words", f"subtasks: {'; '.join(map(str, line.get('subtasks') or ()))}"),
            "plan": lambda line: self._say("words", f"plan: {line.get('motion_plan')}"),
            "correction": lambda line: self._say("words", f"the operator, instead: {_words(line)}", "WARN"),
            "row": self._on_row,
            "decision": self._on_decision,
            "forecast": self._on_forecast,
            "step": self._on_position,
            "step_unseen": self._on_position,
            "substep": self._on_position,
            "chunk": self._on_chunk,
            "verdict": self._on_verdict,
        }

    def event(self, line: Mapping[str, Any]) -> None:
        """See :class:`~vlm2vla_client.live.Sink`."""
        kind = str(line["event"])
        if isinstance(line.get("t_s"), int | float):
            self._at(float(line["t_s"]))
        if kind in self._shown:
            self._shown[kind](line)
        elif kind in TOLD:
            field, level = TOLD[kind]
            self._say("events", f"{kind}: {line.get(field)}", level)

    def picture(self, jpeg: bytes, t_s: float) -> None:
        """See :class:`~vlm2vla_client.live.Sink`."""
        self._at(t_s)
        self._log("camera", self._rerun.EncodedImage(contents=jpeg, media_type="image/jpeg"))

    def close(self) -> None:
        """Closes the file or the connection."""
        self._recording.flush(timeout_sec=FLUSH_S)
        self._recording.disconnect()

    # --- one kind of event each -----------------------------------------------------------------------------------

    def _on_episode(self, line: Mapping[str, Any]) -> None:
        self._recording.send_recording_name(str(line.get("task")))
        self._say("words", f"task: {line.get('task')}")

    def _on_limits(self, line: Mapping[str, Any]) -> None:
        boxes = [(line["box_min_m"], line["box_max_m"]), *line["forbidden_boxes"]]
        lift = (0.0, 0.0, float(line["counter_z_m"]))  # heights are relative to the counter
        mins = [[a + b for a, b in zip(low, lift, strict=True)] for low, _ in boxes]
        sizes = [[b - a for a, b in zip(low, high, strict=True)] for low, high in boxes]
        colours = [GREEN] + [RED] * (len(boxes) - 1)
        self._log("limits", self._rerun.Boxes3D(mins=mins, sizes=sizes, colors=colours), static=True)

    def _on_request(self, line: Mapping[str, Any]) -> None:
        if line.get("stage") != "cycle":
            return
        self._cycle = int(line.get("cycle", 0))
        self._recording.set_time("cycle", sequence=self._cycle)
        self._start_m, self._rows, self._colours, self._path = line.get("position_m"), [], [], []
        self._say("words", f"cycle {self._cycle}: {line.get('subtask')}")

    def _on_row(self, line: Mapping[str, Any]) -> None:
        self._rows.append([float(v) for v in line["row"][:3]])
        self._colours.append(WAITING)
        self._draw_rows()

    def _on_decision(self, line: Mapping[str, Any]) -> None:
        index, verdict = int(line.get("index", -1)), str(line.get("verdict"))
        if 0 <= index < len(self._colours):
            self._colours[index] = COLOURS.get(verdict, RED)
            self._draw_rows()
        text = f"row {index} {line.get('row')}: {verdict} {', '.join(line.get('reasons') or ())}".rstrip()
        self._say("safety", text, LEVELS.get(verdict, "ERROR"))

    def _on_forecast(self, line: Mapping[str, Any]) -> None:
        met = "; ".join(f"{touch['link']} and {touch['thing']}" for touch in line.get("touches") or ())
        word = "forbidden" if line.get("forbidden") else "allowed"
        text = f"{word}: {met or 'nothing met'}; {line.get('reason') or 'completed'}"
        self._say("shadow", text, "ERROR" if line.get("forbidden") else "INFO")

    def _on_position(self, line: Mapping[str, Any]) -> None:
        position = [float(v) for v in line["position_m"]]
        self._path.append(position)
        self._log("arm/end_effector", self._rerun.Points3D([position], radii=[0.006]))
        if line["event"] != "substep":
            self._draw_path()

    def _on_chunk(self, line: Mapping[str, Any]) -> None:
        if line.get("position_m") is not None:
            self._on_position(line)
        text = f"chunk {line.get('outcome')}: {line.get('reason') or ''}".rstrip(": ")
        self._say("events", text, "INFO" if line.get("outcome") == "completed" else "WARN")
        self._recording.flush(timeout_sec=FLUSH_S)  # a viewer that has gone says so only here

    def _on_verdict(self, line: Mapping[str, Any]) -> None:
        good = line.get("success") is True
        text = f"{'done' if good else 'not yet'} ({line.get('confidence')}): {line.get('reasoning')}"
        self._say("verdict", text, "INFO" if good else "WARN")

    # --- Rerun ----------------------------------------------------------------------------------------------------

    def _draw_rows(self) -> None:
        if self._start_m is None:
            return
        here, origins = [float(v) for v in self._start_m], []
        for row in self._rows:
            origins.append(here)
            here = [a + b for a, b in zip(here, row, strict=True)]
        self._log("arm/rows", self._rerun.Arrows3D(origins=origins, vectors=self._rows, colors=self._colours))

    def _draw_path(self) -> None:
        self._log(f"arm/path/{self._cycle}", self._rerun.LineStrips3D([self._path]))

    def _at(self, t_s: float) -> None:
        self._first_s = t_s if self._first_s is None else self._first_s
        self._recording.set_time("run", duration=t_s - self._first_s)

    def _say(self, entity: str, text: str, level: str = "INFO") -> None:
        self._log(entity, self._rerun.TextLog(text, level=level))

    def _log(self, entity: str, what: Any, static: bool = False) -> None:
        self._recording.log(entity, what, static=static, strict=True)


def _words(line: Mapping[str, Any]) -> str:
    return str(line["motion_plan"]["to"] or line["subtask"]["to"])
