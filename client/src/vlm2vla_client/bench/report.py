"""From samples to figures: percentiles, ratios, and the floor beside them; as JSON and as lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from vlm2vla_client.bench.floor import A100, PAPER_CYCLE_S, Device, Floor, Generation, a100_equivalents, floor_of
from vlm2vla_client.bench.probe import PARTS, Sample
from vlm2vla_client.bench.run import Level, Tally
from vlm2vla_client.bench.shape import ModelShape
from vlm2vla_client.evaluation.statistics import quantile
from vlm2vla_client.policies.base import PolicyInfo

FORMAT = 1
PERCENTILES = (50, 95, 99)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99, interpolated linearly; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{share}": round(quantile(ordered, share / 100), 3) for share in PERCENTILES}


def server_figures(tally: Tally, robots: int, seconds: float) -> dict[str, Any]:
    """One server under one number of robots."""
    samples = tally.samples
    rows = [sample.first_row_ms for sample in samples if sample.first_row_ms is not None]
    steps = [sample.ms_per_token for sample in samples if sample.ms_per_token is not None]
    return {
        "answers": len(samples),
        "errors": dict(tally.errors),
        "retried": sum(sample.attempts > len(sample.work) for sample in samples),
        "answers_per_s": round(len(samples) / seconds, 3) if seconds > 0.0 else 0.0,
        "wall_ms": percentiles([sample.wall_ms for sample in samples]),
        "first_row_ms": percentiles(rows),
        "parts_ms": {name: percentiles([sample.parts[name] for sample in samples]) for name in PARTS},
        "ms_per_token": percentiles(steps),
        "tokens_p50": tokens_p50(samples),
    }


def tokens_p50(samples: Sequence[Sample]) -> dict[str, int]:
    """Medians of the tokens of one answer, all stages together."""
    if not samples:
        return {}
    return {
        "prompt": round(median(sample.prompt_tokens for sample in samples)),
        "generated": round(median(sample.generated_tokens for sample in samples)),
        "cached": round(median(sample.cached_tokens for sample in samples)),
    }


def ratios(pairs: Sequence[tuple[Sample, Sample]]) -> dict[str, Any]:
    """The second server's times over the first's, request by request, at the median: below 1 the second is faster."""
    walls = [second.wall_ms / first.wall_ms for first, second in pairs]
    rows = [b.first_row_ms / a.first_row_ms for a, b in pairs if a.first_row_ms and b.first_row_ms]
    found: dict[str, Any] = {"pairs": len(pairs), "wall": _median(walls), "first_row": _median(rows)}
    found["parts"] = {
        name: _median([b.parts[name] / a.parts[name] for a, b in pairs if a.parts[name] > 0.0]) for name in PARTS
    }
    return found


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), 4) if values else None


def typical_work(samples: Sequence[Sample], shape: ModelShape) -> tuple[Generation, ...]:
    """The tokens whose floor stands beside the medians: stage by stage, the median of each count. Where as many tokens
    as a picture has were cached, the picture was among them: it stands first in every prompt."""
    count = min((len(sample.work) for sample in samples), default=0)
    found = []
    for index in range(count):
        stage = [sample.work[index] for sample in samples]
        cached = round(median(part.cached for part in stage))
        pictures = 0 if cached >= shape.tower.image_tokens else stage[0].pictures
        prompt, generated = median(part.prompt for part in stage), median(part.generated for part in stage)
        found.append(Generation(round(prompt), round(generated), cached, pictures))
    return tuple(found)


def floor_figures(
    shape: ModelShape, device: Device, work: tuple[Generation, ...], robots: int, measured_ms: float | None
) -> dict[str, Any]:
    """The floor, and a measured median beside it where there is one. ``a100_equivalents``: how many A100s the machine
    is worth; ``as_on_an_a100_s``: the measured cycle on an A100 used as well as this machine was."""
    floor, reference = floor_of(shape, device, work, robots), floor_of(shape, A100, work, robots)
    found = {**floor_parts(floor), "a100_equivalents": round(a100_equivalents(shape, device, work), 3)}
    if measured_ms is not None:
        times = measured_ms / floor.cycle_ms
        found |= {
            "times_the_floor": round(times, 3),
            "as_on_an_a100_s": round(times * reference.cycle_ms / 1000.0, 3),
        }
    return found


def floor_parts(floor: Floor) -> dict[str, Any]:
    """A floor as plain figures."""
    return {
        "device": floor.device,
        "robots": floor.robots,
        "cycle_ms": round(floor.cycle_ms, 3),
        "vision_ms": round(floor.vision_ms, 3),
        "prefill_ms": round(floor.prefill_ms, 3),
        "decode_ms": round(floor.decode_ms, 3),
        "ms_per_token": round(floor.ms_per_token, 4),
    }


def shape_figures(shape: ModelShape, device: Device) -> dict[str, Any]:
    """The model behind a floor."""
    decoder, number = shape.decoder, 2.0
    return {
        "name": shape.name,
        "parameters": shape.parameters,
        "weights_gb": round(device.weight_bytes * decoder.read_per_token / 1e9, 3),
        "kv_bytes_per_token": decoder.kv_bytes(1, number),
        "kv_bytes_per_token_past_the_window": decoder.kv_bytes(decoder.window + 1, number)
        - decoder.kv_bytes(decoder.window, number),
        "global_layers": decoder.global_layers,
        "weight_bits": round(8 * device.weight_bytes),
        "bandwidth_gb_s": device.bandwidth_gb_s,
        "tflops": device.tflops,
    }


def level_figures(level: Level, floor: tuple[ModelShape, Device] | None) -> dict[str, Any]:
    """One number of robots: every server, their ratio, and the floor for what was generated."""
    servers: dict[str, Any] = {}
    for name, tally in level.tallies.items():
        figures = server_figures(tally, level.robots, level.seconds)
        if floor is not None and tally.samples:
            work, wall_ms = typical_work(tally.samples, floor[0]), figures["wall_ms"]["p50"]
            figures["floor"] = floor_figures(*floor, work, level.robots, wall_ms)
        servers[name] = figures
    found: dict[str, Any] = {"robots": level.robots, "seconds": round(level.seconds, 3), "servers": servers}
    if len(level.tallies) == 2:
        found["ratio"] = ratios(level.pairs)
    return found


def about_server(info: PolicyInfo) -> dict[str, Any]:
    """What a figure must name of the server."""
    kept = ("engine", "device", "versions", "base_model", "base_hash", "image_size", "adapters", "limits")
    details = info.details
    return {"model": info.name, **{name: details[name] for name in kept if name in details}}


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """The table for people."""
    head = f"{'robots':>6} {'server':<10} {'answers':>7} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9} {'1st row':>9}"
    lines = [head + "".join(f" {name:>10}" for name in PARTS) + f" {'ms/token':>9}"]
    for level in report["levels"]:
        for name, figures in level["servers"].items():
            lines.append(_server_line(level["robots"], name, figures))
            if figures["errors"]:
                lines.append(f"{'':>6} errors: " + ", ".join(f"{n} {code}" for code, n in figures["errors"].items()))
            if "floor" in figures:
                lines.append(f"{'':>6} {floor_line(figures['floor'])}")
        if "ratio" in level:
            lines.append(f"{'':>6} {ratio_line(level['ratio'], list(level['servers']))}")
    return lines


def _server_line(robots: int, name: str, figures: Mapping[str, Any]) -> str:
    wall = figures["wall_ms"] or {}
    cells = [wall.get(f"p{share}") for share in PERCENTILES] + [(figures["first_row_ms"] or {}).get("p50")]
    parts = [(figures["parts_ms"][part] or {}).get("p50") for part in PARTS]
    line = f"{robots:>6} {name:<10.10} {figures['answers']:>7}" + "".join(f" {_ms(cell):>9}" for cell in cells)
    line += "".join(f" {_ms(part):>10}" for part in parts)
    return line + f" {_ms((figures['ms_per_token'] or {}).get('p50')):>9}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def ratio_line(ratio: Mapping[str, Any], names: Sequence[str]) -> str:
    """The comparison in words."""
    if not ratio["pairs"]:
        return "ratio: no request was answered by both"
    row = "" if ratio["first_row"] is None else f", first row {ratio['first_row']:.3f}"
    parts = ", ".join(f"{name} {value:.2f}" for name, value in ratio["parts"].items() if value is not None)
    return f"{names[1]} / {names[0]}, median of {ratio['pairs']} pairs: wall {ratio['wall']:.3f}{row} ({parts})"


def floor_line(floor: Mapping[str, Any]) -> str:
    """A floor in words, beside the paper's cycle."""
    line = (
        f"floor on {floor['device']}: {_ms(floor['cycle_ms'])} ms = vision {_ms(floor['vision_ms'])} + prefill "
        f"{_ms(floor['prefill_ms'])} + decode {_ms(floor['decode_ms'])} ({_ms(floor['ms_per_token'])} ms a token); "
        f"worth {floor['a100_equivalents']:.2f} A100"
    )
    if "times_the_floor" in floor:
        line += f"; measured {floor['times_the_floor']:.2f} times that, as {floor['as_on_an_a100_s']:.2f} s on an A100"
    return line


def summary_line(report: Mapping[str, Any]) -> str:
    """One line: the first server alone, the most robots, and the paper's cycle."""
    first = report["levels"][0]
    name, alone = next(iter(first["servers"].items()))
    if alone["wall_ms"] is None:
        return f"{report['endpoint']}: no answer from {name}"
    seconds = alone["wall_ms"]["p50"] / 1000.0
    text = f"{report['endpoint']}, {first['robots']} robot{'s' * (first['robots'] > 1)}: median {seconds:.3f} s"
    last = report["levels"][-1]
    busy = last["servers"][name]
    if last is not first and busy["wall_ms"] is not None:
        text += f"; {last['robots']} robots: {busy['wall_ms']['p50'] / 1000.0:.3f} s, {busy['answers_per_s']:.2f}/s"
    if report["endpoint"] == "cycle":
        text += f"; the paper's cycle on an A100: {PAPER_CYCLE_S} s = {PAPER_CYCLE_S / seconds:.1f} times this"
    return text
