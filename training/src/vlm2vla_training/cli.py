"""`vlm2vla-train`: robot logs to sentences to an adapter. One subcommand a stage; heavy imports happen inside them."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm2vla_schema.embodiments import EMBODIMENTS
from vlm2vla_schema.errors import VLM2VLAError
from vlm2vla_training.errors import MissingExtraError, UsageError

# Optional module -> the extra that brings it.
_EXTRAS = {"mujoco": "sim", "torch": "train", "transformers": "train", "trl": "train", "peft": "train",
           "matplotlib": "train", "scipy": "train", "compressed_tensors": "train", "httpx": "sim", "google": "gemini",
           "pyrate_limiter": "gemini", "tenacity": "gemini", "ray": "ray", "av": "video"}  # fmt: skip
# Those of sft.py, which needs torch to be imported; a test compares.
_PRESETS = ("twin", "paper", "servable", "at", "nr", "qwen", "full_finetune", "qlora")
_SCOPES = ("language_model", "paper", "all_linear")
_FORMATS = ("adapter", "merged", "merged-fp8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0 done, 1 a data or training error, 2 usage, 130 interrupted.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "pretrain":
        args.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _dispatch(args)
    except (UsageError, MissingExtraError) as error:
        print(f"vlm2vla-train {args.command}: {error}", file=sys.stderr)
        return 2
    except VLM2VLAError as error:
        print(f"vlm2vla-train {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vlm2vla-train {args.command}: interrupted; the same command resumes", file=sys.stderr)
        return 130


def _dispatch(args: argparse.Namespace) -> int:
    module, function = args.target.split(":")
    try:
        run = getattr(importlib.import_module(f"vlm2vla_training.{module}"), function)
        return int(run(args))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        raise MissingExtraError(f"{error.name} is missing; install vlm2vla-training[{extra}]") from error


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every subcommand."""
    parser = argparse.ArgumentParser(prog="vlm2vla-train", description="Robot logs to sentences to an adapter.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demos(commands)
    _add_ingest(commands)
    _add_annotate(commands)
    _add_audit(commands)
    _add_curate(commands)
    _add_pretrain(commands)
    _add_sft(commands)
    _add_export(commands)
    _add_tokens(commands)
    _add_logprobs(commands)
    _add_predict(commands)
    _add_verify_report(commands)
    _add_vqa(commands)
    _add_estimate(commands)
    _add_export_lerobot(commands)
    return parser


Commands = argparse._SubParsersAction  # the type of add_subparsers(), which argparse does not export


def _command(commands: Commands[argparse.ArgumentParser], name: str, target: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.set_defaults(target=target)
    command.add_argument("--out", type=Path, required=True, help="folder to write; an unfinished run in it is resumed")
    command.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing")
    return command


def _add_demos(commands: Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "demos", "demos:run_demos", "scripted demonstrations in the twin -> episode dataset")
    command.add_argument("--suite", action="append", required=True, help="suite of the twin; repeatable")
    command.add_argument("--seed", type=int, default=0, help="first seed; training seeds lie below 500000")
    command.add_argument("--episodes", type=int, default=100, help="episodes a suite")
    command.add_argument("--mode", choices=("varied", "paper"), default="varied", help="what the scene varies")
    command.add_argument("--speed-m", type=float, default=0.0124, help="longest motion of a 5 Hz step an axis, metres")
    command.add_argument("--aim-m", type=float, default=0.045, help="largest misjudged aim, metres")
    command.add_argument("--misjudge", type=float, default=0.4, help="probability of misjudging an aim")
    command.add_argument("--residual-m", type=float, default=0.009, help="aim error corrected while descending, metres")
    command.add_argument("--miss", type=float, default=0.12, help="probability of closing too high or beside at first")
    command.add_argument("--policy", metavar="URL", help="let the policy of this server make the first attempts")
    command.add_argument("--width", type=int, default=640, help="width of the stored frames, pixels")
    command.add_argument("--height", type=int, default=480, help="height of the stored frames, pixels")
    command.add_argument("--workers", type=int, default=1, help="processes")
    command.add_argument("--keep-failures", action="store_true", help="also write episodes that missed the full score")


def _add_ingest(commands: Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "ingest", "ingest:run_ingest", "robot logs or twin demos -> episode dataset")
    command.add_argument("--format", choices=("recordings", "twin", "rlds", "raw", "lerobot"), default="recordings")
    command.add_argument("--input", type=Path, required=True, help="folder (rlds: or one file) to read")
    command.add_argument("--successful-only", action="store_true", help="leave out recordings that did not succeed")
    command.add_argument("--keep-unlabelled", action="store_true", help="keep episodes without an instruction")
    command.add_argument(
        "--actions", choices=("commanded", "reached"), default="commanded", help="as logged, or what the poses show"
    )
    command.add_argument("--camera", default=None, help="fixed camera in the source; default image_0 or its like")
    command.add_argument("--workers", type=int, help="rlds: processes on this machine (a core each from 256 MB on)")
    command.add_argument("--ray", metavar="ADDRESS", help="rlds: spread over a Ray cluster that shares both folders")


def _add_annotate(commands: Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "annotate", "commands:run_annotate", "episode dataset -> annotated.jsonl")
    command.add_argument("--episodes", type=Path, required=True, help="episode dataset")
    command.add_argument("--annotator", choices=("rules", "gemini", "corrections"), default="rules")
    command.add_argument(
        "--annotated", type=Path, help="corrections: the annotations they are laid on; default: those of rules"
    )
    command.add_argument(
        "--means", action="append", default=[], metavar="TEXT=ENGLISH",
        help="rules: what an instruction in words of your own says in the English that they read; repeatable",
    )  # fmt: skip
    command.add_argument(
        "--plain-names", action="store_true", help="rules: 'Move to the carrot' instead of 'Move to Carrot'"
    )
    gemini = command.add_argument_group("gemini", "key in GEMINI_API_KEY; --prices and --max-usd are required")
    gemini.add_argument("--prices", type=Path, help="TOML: a table a model, input_usd and output_usd a million tokens")
    gemini.add_argument("--max-usd", type=float, help="stop before more could be spent, earlier runs in --out included")
    gemini.add_argument("--model", default="gemini-2.5-flash")
    gemini.add_argument(
        "--prompt-version", choices=("b1-ranges", "b1-paper"), default="b1-ranges",
        help="ask for row ranges (ours), or for copied actions as the paper prints it",
    )  # fmt: skip
    gemini.add_argument("--temperature", type=float, default=None, help="default: the model's own, as in the paper")
    gemini.add_argument("--top-p", type=float, default=None, help="default: the model's own, as in the paper")
    gemini.add_argument("--max-output-tokens", type=int, default=16384, help="of one answer, thoughts included")
    gemini.add_argument("--frames-every", type=int, default=1, help="show every n-th observation, and the last")
    gemini.add_argument("--embodiment", choices=tuple(EMBODIMENTS), default="widowx", help="card of the log's axes")
    gemini.add_argument("--concurrency", type=int, default=8, help="requests under way at a time")
    gemini.add_argument("--requests-per-minute", type=int, default=150, help="limit of your account")
    gemini.add_argument("--tokens-per-minute", type=int, default=1_000_000, help="limit of your account, prompts only")
    gemini.add_argument("--attempts", type=int, default=8, help="for one answer, when Google is busy")
    gemini.add_argument("--batch", action="store_true", help="Google's Batch mode: half the price, up to a day")
    gemini.add_argument("--batch-episodes", type=int, default=500, help="of one job")
    gemini.add_argument("--poll-s", type=float, default=30.0, help="between two looks at the jobs of --batch")
    gemini.add_argument("--first-wait-s", type=float, default=2.0, help="longest wait before the second attempt")


def _add_audit(commands: Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "audit", "audit_page:run_audit", "annotations -> a page on which a person judges them")
    command.add_argument("--episodes", type=Path, required=True, help="episode dataset")
    command.add_argument("--annotated", type=Path, required=True, help="annotated.jsonl or its folder")
    command.add_argument("--sample", type=int, default=40, help="episodes on the page; those with findings come first")
    command.add_argument("--key", action="append", default=[], help="an episode that must be on the page; repeatable")
    command.add_argument("--seed", type=int, default=0, help="of the sample")


def _add_curate(commands: Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "curate", "commands:run_curate", "episodes and annotations -> training examples")
    command.add_argument("--episodes", type=Path, required=True, help="episode dataset")
    command.add_argument("--annotated", type=Path, required=True, help="annotated.jsonl or its folder")
    command.add_argument("--decisions", type=Path, help="accepted and rejected episodes, saved from the page of audit")
    command.add_argument("--variant", choices=("main", "at", "nr"), default="main", help="text, action tokens, no plan")
    command.add_argument(
        "--kinds", default="subtasks,motion_plan,actions,completion,verify,direction", help="comma separated"
    )
    command.add_argument("--plan-source", choices=("main_movements", "reasoning", "both"), default="main_movements")
    command.add_argument("--image-size", type=int, default=0, help="square side in pixels; 0 keeps frames as logged")
    command.add_argument("--extra-starts", type=int, default=0, help="further starting frames inside each step (ours)")
    command.add_argument("--verify-pairs", type=int, default=2, help="verifier pairs of each sign a step")
    command.add_argument("--verify-negatives", type=int, default=1, help="negatives for each positive of these")
    command.add_argument("--single-dim-m", type=float, default=0.025, help="B.2's single-axis threshold, metres")
    command.add_argument("--absolute-m", type=float, default=0.05, help="B.2's absolute threshold, metres")
    command.add_argument("--chunk-mode", choices=("paper", "flush"), default="paper")
    command.add_argument("--max-row-translation-m", type=float, default=0.10, help="limit of the parser, metres")
    command.add_argument("--max-rows", type=int, default=32, help="limit of the parser")
    command.add_argument("--seed", type=int, default=0, help="of the sampled negatives and extra starts")
    command.add_argument("--workers", type=int, default=1, help="processes on this machine")
    command.add_argument("--ray", metavar="ADDRESS", help="spread over a Ray cluster that shares the folders")


def _add_pretrain(commands: Commands[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("pretrain", help="train the twin's base model from nothing", add_help=False)
    command.set_defaults(target="cli:run_pretrain")


def run_pretrain(args: argparse.Namespace) -> int:
    """Hand the remaining arguments to pretrain_command.main, which has its own parser."""
    from vlm2vla_training import pretrain_command

    return pretrain_command.main(args.rest)


def _add_sft(commands: Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "sft", "sft:run_sft", "fine-tune a base model on curated examples (TRL and PEFT)")
    command.add_argument("--base", type=Path, required=True, help="base model folder")
    command.add_argument("--examples", type=Path, action="append", required=True, help="folder of curate; repeatable")
    command.add_argument("--adapter", type=Path, default=None, help="exported adapter to go on from; default: none")
    command.add_argument("--preset", choices=_PRESETS, default="twin", help="paper: Table 4 as printed")
    command.add_argument(
        "--scope", choices=_SCOPES, default=None,
        help="linears that get an adapter; default: the preset's, language_model (what servers load) but for paper",
    )  # fmt: skip
    command.add_argument("--full-finetune", action="store_true", help="train every weight instead of LoRA")
    command.add_argument("--epochs", type=float, default=None, help="overrides the preset")
    command.add_argument("--max-steps", type=int, default=None, help="stop after this many optimiser steps")
    command.add_argument("--learning-rate", type=float, default=None, help="overrides the preset")
    command.add_argument("--batch-size", type=int, default=None, help="examples a micro-batch; overrides the preset")
    command.add_argument("--accumulation", type=int, default=None, help="micro-batches a step; overrides the preset")
    command.add_argument("--rank", type=int, default=None, help="LoRA rank; overrides the preset")
    command.add_argument("--max-tokens", type=int, default=None, help="longest example; overrides the preset")
    command.add_argument("--warmup-steps", type=int, default=None, help="overrides the preset")
    command.add_argument("--kinds", default=None, help="comma separated; default all")
    command.add_argument("--save-steps", type=int, default=500, help="checkpoint interval in optimiser steps")
    command.add_argument("--held-out", type=float, default=0.0, help="fraction of episodes kept for the held-out loss")
    command.add_argument("--dump", type=int, default=0, help="write this many examples a kind to loss.txt, decoded")
    command.add_argument("--no-tensorboard", action="store_true", help="log.jsonl only")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    command.add_argument("--compile", action="store_true", help="fuse the language layers; needs a C++ compiler")


def _add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "export", "export:run_export", "training run -> model artifact with model_card.json")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a finished sft run")
    source.add_argument("--adapter", type=Path, help="an exported adapter: write it again, with references, or merged")
    command.add_argument(
        "--format", choices=_FORMATS, default=None,
        help="default: adapter, of a full fine-tune the whole model; merged and merged-fp8 stand without their base",
    )  # fmt: skip
    command.add_argument("--name", default="twin", help="name in the model card")
    command.add_argument("--licence", default=None, help="default: the base model's")
    command.add_argument("--metrics", type=Path, default=None, help="JSON file with measured results for the card")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the stored weights")
    command.add_argument("--base", type=Path, default=None, help="base model folder; default for --run: the run's own")
    command.add_argument(
        "--no-references", dest="references", action="store_false", help="leave the log-probabilities out of the card"
    )
    command.add_argument("--unservable", action="store_true", help="export an adapter that vLLM would load wrongly")
    command.add_argument("--device", default="cpu", help="where the model is asked, in float32: cpu, cuda, cuda:N")
    command.add_argument("--episodes", type=Path, help="dataset for the predicted paths in report.html; not trained on")
    command.add_argument("--annotated", type=Path, help="annotated.jsonl of --episodes, or its folder")
    command.add_argument("--held-out", type=float, default=1.0, help="of --episodes: the fraction given to sft; 1: all")
    command.add_argument("--predict-episodes", type=int, default=4, help="at most so many of them")
    command.add_argument("--camera", type=Path, help="JSON with the camera's 3x4 projection; the twin's is known")


def _add_tokens(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "token lengths of examples by kind, against the limit: table and picture"
    command = _command(commands, "tokens", "analysis.tokens:run_tokens", text)
    command.add_argument(
        "--base", type=Path, required=True, help="model folder whose processor counts; no weights needed"
    )
    command.add_argument("--examples", type=Path, action="append", required=True, help="folder of curate; repeatable")
    command.add_argument("--max-tokens", type=int, default=1024, help="the limit; appendix E prints 1024")


def _add_logprobs(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "Fig. 3: log-probabilities of actions as text, tokens and bins under an untouched model, with the figure"
    command = _command(commands, "logprobs", "analysis.logprobs:run_logprobs", text)
    command.add_argument("--base", type=Path, required=True, help="base model folder, before fine-tuning")
    command.add_argument(
        "--examples", type=Path, action="append", required=True, help="folder of curate with text actions; repeatable"
    )
    command.add_argument("--limit", type=int, default=0, help="score this many actions, evenly spread; 0 all")
    command.add_argument("--bins", type=int, default=256, help="bins an axis, as in RT-2 and OpenVLA")
    command.add_argument(
        "--measure-on", type=int, default=64, help="actions on which the least likely tokens are found"
    )
    command.add_argument("--batch-size", type=int, default=8)
    _add_model(command)


def _add_predict(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "a model's plans and rows on held-out episodes, against their logs"
    command = _command(commands, "predict", "analysis.predict:run_predict", text)
    command.add_argument("--base", type=Path, required=True, help="base model folder")
    command.add_argument("--adapter", type=Path, default=None, help="exported adapter; without one the base is asked")
    command.add_argument("--episodes", type=Path, required=True, help="episode dataset")
    command.add_argument("--annotated", type=Path, required=True, help="annotated.jsonl or its folder")
    command.add_argument(
        "--held-out", type=float, default=1.0, help="the fraction given to sft; 1: all, never trained on"
    )
    command.add_argument("--plan", choices=("own", "logged"), default="own", help="whose motion plan the rows follow")
    command.add_argument("--limit", type=int, default=0, help="at most this many episodes; 0 all")
    _add_model(command)


def _add_verify_report(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "how far a model's word that a subtask is done can be trusted, on held-out pairs of frames"
    command = _command(commands, "verify-report", "analysis.verify:run_verify_report", text)
    command.add_argument("--base", type=Path, required=True, help="base model folder, or a merged model")
    command.add_argument("--adapter", type=Path, default=None, help="exported adapter; without one the base is asked")
    command.add_argument("--episodes", type=Path, action="append", required=True, help="dataset; repeatable")
    command.add_argument(
        "--annotated", type=Path, action="append", required=True, help="annotated.jsonl or its folder; repeatable"
    )
    command.add_argument(
        "--held-out", type=float, default=1.0, help="the fraction given to sft; 1: all, never trained on"
    )
    command.add_argument("--verify-pairs", type=int, default=4, help="pairs of each sign a step, as for curate")
    command.add_argument("--seed", type=int, default=0, help="of the sampled negatives")
    command.add_argument("--no-next-subtask", action="store_true", help="leave D.5's next subtask out of the prompt")
    command.add_argument("--max-false-success", type=float, default=0.02, help="that a threshold is chosen for")
    command.add_argument(
        "--write-threshold", action="store_true", help="store what holds it on all pairs in the adapter's card"
    )
    command.add_argument("--limit", type=int, default=0, help="at most this many episodes; 0 all")
    command.add_argument("--batch-size", type=int, default=16)
    _add_model(command)


def _add_vqa(commands: Commands[argparse.ArgumentParser]) -> None:
    text = "what an adapter keeps of its base's question answering: Table 1 by lmms-eval, or the twin's benchmark"
    command = _command(commands, "vqa", "vqa.command:run_vqa", text)
    command.add_argument(
        "--benchmarks", default="twin", metavar="WHICH",
        help="twin (needs nothing else), table1 (the paper's twelve), or lmms-eval's TASK[=METRIC] by commas",
    )  # fmt: skip
    command.add_argument("--server", default="http://127.0.0.1:8000", help="where vlm2vla-server answers")
    command.add_argument("--api-key", default=None, help="sent as a bearer token (or set VLM2VLA_API_KEY)")
    command.add_argument("--models", default=None, help="adapters beside the base, by commas; default: the server's")
    command.add_argument("--concurrent", type=int, default=4, help="requests at a time; not above --max-concurrency")
    command.add_argument("--questions", type=int, default=60, help="twin: questions of each kind, in two wordings")
    command.add_argument("--seed", type=int, default=1_000_000, help="twin: first seed; from 1000000 on tests")
    command.add_argument("--lmms-python", type=Path, default=None, help="python of the environment with lmms-eval")
    command.add_argument("--include-path", type=Path, default=None, help="lmms-eval: folder of your own task files")
    command.add_argument("--limit", type=int, default=0, help="lmms-eval: questions a task; 0 all")
    command.add_argument("--check-tasks", action="store_true", help="only compare Table 1 with the lmms-eval there")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def _add_estimate(commands: Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "estimate", "estimate:run_estimate", "dollars, hours, gigabytes before any is spent")
    command.add_argument("--episodes", type=Path, required=True, help="episode dataset, or a part of the one you mean")
    command.add_argument("--episodes-total", type=int, default=None, help="size of the whole; default: as many as here")
    command.add_argument("--annotated", type=Path, help="annotated.jsonl or its folder; default: rules stand in")
    command.add_argument("--base", type=Path, required=True, help="base model folder, or its config.json alone")
    command.add_argument("--preset", choices=_PRESETS, default="paper", help="of sft")
    command.add_argument("--image-size", type=int, default=0, help="as for curate")
    command.add_argument("--sample", type=int, default=50, help="episodes to build examples from")
    command.add_argument("--prices", type=Path, help="table of annotate --annotator gemini; without it no such cost")
    command.add_argument("--model", default="gemini-2.5-flash", help="that annotates")
    command.add_argument("--prompt-version", choices=("b1-ranges", "b1-paper"), default="b1-ranges")
    command.add_argument("--frames-every", type=int, default=1, help="as for annotate")
    command.add_argument("--batch", action="store_true", help="at the table's prices for Google's Batch mode")
    command.add_argument("--requests-per-minute", type=int, default=150, help="limit of your Gemini account")
    command.add_argument("--tokens-per-minute", type=int, default=1_000_000, help="limit of your Gemini account")
    command.add_argument("--gpus", type=int, default=4, help="appendix E: one node with 4 A100")
    command.add_argument("--gpu-tflops", type=float, default=312.0, help="of one GPU, dense bfloat16")
    command.add_argument("--utilisation", type=float, default=0.35, help="part of it that training reaches")
    command.add_argument("--gpu-usd-per-hour", type=float, default=None, help="of one GPU")


def _add_export_lerobot(commands: Commands[argparse.ArgumentParser]) -> None:
    command = _command(
        commands, "export-lerobot", "lerobot_export:run_export_lerobot", "recordings or episodes -> LeRobot dataset v3"
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--recordings", type=Path, help="folder with recordings of vlm2vla-client run")
    source.add_argument("--episodes", type=Path, help="episode dataset of demos or ingest")
    command.add_argument("--fps", type=int, default=5, help="of the timestamps; rows of a run have no fixed rate")
    command.add_argument("--robot-type", default="widowx", help="name in meta/info.json")


if __name__ == "__main__":
    sys.exit(main())
