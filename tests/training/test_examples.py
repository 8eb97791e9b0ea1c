import dataclasses
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xgrammar
from training_fakes import EGGPLANT_FISH, PICK, PLACE, RETRY, Segment, episode_of

from vlm2vla_schema import prompts
from vlm2vla_schema.digits import decode_digits
from vlm2vla_schema.grammar import actions_grammar, subtasks_grammar, verdict_grammar
from vlm2vla_schema.parsing import parse_actions, parse_motion_plan, parse_subtasks, parse_verdict
from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.annotation.rules import RulesAnnotator
from vlm2vla_training.curation.dataset import CurateCounts, ExampleWriter, curate, load_examples
from vlm2vla_training.curation.examples import DIGIT_MAP, Example, ExampleOptions, examples_of
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
MAIN = ExampleOptions(extra_starts=2)


def annotated(segments: list[Segment], instruction: str, noise_m: float = 0.001) -> tuple[Episode, AnnotatedEpisode]:
    episode = episode_of(segments, instruction, noise_m=noise_m)
    return episode, RulesAnnotator().annotate(episode)


def examples(segments: list[Segment], instruction: str, options: ExampleOptions = MAIN) -> list[Example]:
    return examples_of(annotated(segments, instruction)[1], options).examples


def accepts(grammar: str, text: str) -> bool:
    vocabulary = xgrammar.TokenizerInfo([bytes([value]) for value in range(256)])
    compiled = xgrammar.GrammarCompiler(vocabulary).compile_grammar(grammar)
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    return matcher.accept_string(text) and matcher.is_terminated()


@pytest.mark.parametrize(
    ("segments", "task"),
    [(PICK, "pick up the carrot"), (PLACE, "put the carrot on the yellow plate"), (RETRY, "pick up the carrot")],
)
def test_what_curate_writes_the_server_parses_and_its_grammar_accepts(segments: list[Segment], task: str) -> None:
    found = examples(segments, task)
    for example in found:
        if example.kind == "actions":
            assert parse_actions(example.completion).rows
        elif example.kind == "subtasks":
            assert parse_subtasks(example.completion)
        elif example.kind == "motion_plan":
            assert parse_motion_plan(example.completion) == example.completion
        elif example.kind == "verify":
            assert parse_verdict(example.completion).confidence == "High"
    for kind, grammar in (
        ("actions", actions_grammar()),
        ("subtasks", subtasks_grammar()),
        ("verify", verdict_grammar()),
    ):
        texts = sorted({example.completion for example in found if example.kind == kind}, key=len)
        for text in (texts[0], texts[-1]):
            assert accepts(grammar, text)


def test_subtasks_are_those_that_remain() -> None:
    found = [
        example for example in examples(PICK, "pick up the carrot", ExampleOptions()) if example.kind == "subtasks"
    ]
    assert [parse_subtasks(example.completion) for example in found] == [
        ["Move to Carrot", "Grasp Carrot", "Lift Carrot"],
        ["Grasp Carrot", "Lift Carrot"],
        ["Lift Carrot"],
    ]
    assert found[0].prompt == prompts.subtasks_prompt("pick up the carrot")


def test_actions_follow_the_plan_of_their_own_frame() -> None:
    plans = {}
    for example in examples(PLACE, "put the carrot on the yellow plate"):
        assert example.episode_key == "fake/0" and example.variant == "main"
        if example.kind == "motion_plan":
            plans[example.images] = example.completion
            assert not any(letter.isdigit() for letter in example.completion)
        if example.kind == "actions":
            assert f"and the reasoning '{plans[example.images]}', output" in example.prompt


def test_completion_is_positive_for_the_next_step_only() -> None:
    steps = annotated(PLACE, "put the carrot on the yellow plate")[1].steps
    starts = [step.first for step in steps]
    for example in examples(PLACE, "put the carrot on the yellow plate"):
        if example.kind == "completion":
            before, after = example.images
            index = starts.index(before)
            end = starts[index + 1] if index + 1 < len(starts) else steps[-1].last
            assert (example.completion == "yes") == (after == end)


def test_verify_examples_are_balanced_and_name_the_next_subtask() -> None:
    found = [example for example in examples(PLACE, "put the carrot on the yellow plate") if example.kind == "verify"]
    verdicts = Counter(parse_verdict(example.completion).success for example in found)
    assert verdicts[True] == verdicts[False]
    versions = {example.prompt_version for example in found if example.last < found[-1].last}
    assert versions == {"d5"} and found[-1].prompt_version == "d5-last"
    assert all(one.images[0] <= one.images[1] for one in found), "no service is asked about frames in reverse"


def test_each_positive_may_have_several_negatives_in_turn_near_the_end_and_far_from_it() -> None:
    options = dataclasses.replace(MAIN, kinds=("verify",), verify_pairs=4, verify_negatives=3)
    steps = annotated(PICK, "pick up the carrot")[1].steps
    found = examples(PICK, "pick up the carrot", options)
    verdicts = Counter(parse_verdict(example.completion).success for example in found)
    assert verdicts == {True: 4 * len(steps), False: 12 * len(steps)}
    of_move = Counter(one.images[1] >= steps[1].first - 3 for one in found if one.last == steps[0].last)
    assert of_move == {True: 4 + 6, False: 6}


def test_a_second_try_is_judged_from_where_the_first_one_ended() -> None:
    options = dataclasses.replace(MAIN, verify_pairs=12)
    steps = annotated(PICK, "pick up the carrot")[1].steps
    found = [one for one in examples(PICK, "pick up the carrot", options) if one.kind == "verify"]
    done = [one for one in found if parse_verdict(one.completion).success]
    befores = {one.images[0] for one in done if one.images[1] == steps[1].first}
    assert befores > {steps[0].first}, "the step's start, and later frames"
    assert max(befores) >= steps[1].first - 1, "up to the one that shows it done"


def test_a_step_that_the_log_repeats_is_shown_as_a_failure_and_not_imitated() -> None:
    episode = annotated(RETRY, "pick up the carrot", 0.0)[1]
    failed = episode.steps[1]
    found = examples_of(episode, MAIN)
    of_step = [example for example in found.examples if failed.first <= example.first <= failed.last]
    assert found.not_imitated == 2, "nor is the move, which ended 3 cm beside where the object was then taken"
    assert {example.kind for example in of_step} == {"completion", "verify"}
    assert all("true" not in example.completion and "yes" not in example.completion for example in of_step)


def test_on_the_way_of_a_move_that_ended_beside_no_frame_is_called_not_done() -> None:
    episode = annotated(RETRY, "pick up the carrot", 0.0)[1]
    move, grasp = episode.steps[:2]
    assert move.missed
    found = examples_of(episode, dataclasses.replace(MAIN, kinds=("verify",), verify_pairs=24)).examples
    after = {step.first: {one.images[1] for one in found if one.last == step.last} for step in (move, grasp)}
    assert after[move.first] == {move.first, grasp.first}, "in between it may have been right"
    inside = set(range(grasp.first + 1, grasp.last + 1)) & after[grasp.first]
    assert inside and all(grasp.actions[frame - grasp.first - 1][3] == 1 for frame in inside), "still to be closed"


def test_action_tokens_decode_to_the_same_rows() -> None:
    text = [example for example in examples(PICK, "pick up the carrot") if example.kind == "actions"]
    options = dataclasses.replace(MAIN, variant="at")
    tokens = [example for example in examples(PICK, "pick up the carrot", options) if example.kind == "actions"]
    for one, other in zip(text, tokens, strict=True):
        assert decode_digits(other.completion, DIGIT_MAP) == one.completion
        assert one.prompt == other.prompt


def test_printed_tokens_of_b3() -> None:
    rows = json.loads((GOLDEN / "b2_chunking.json").read_text())["after"]
    from vlm2vla_schema.digits import encode_digits
    from vlm2vla_schema.parsing import format_actions

    printed = encode_digits(format_actions(rows), DIGIT_MAP)
    assert printed.startswith("[[-<unused6133>.<unused6133><unused6133><unused6135>, -<unused6133>.")
    assert decode_digits(printed, DIGIT_MAP) == format_actions(rows)


def test_without_reasoning_the_task_is_the_subtask() -> None:
    found = examples(PICK, "pick up the carrot", dataclasses.replace(MAIN, variant="nr"))
    assert {example.kind for example in found} == {"actions"}
    assert {example.prompt for example in found} == {prompts.actions_prompt("pick up the carrot", None)}


def test_what_the_parser_would_refuse_is_dropped_and_named() -> None:
    far: list[Segment] = [(0.3, 0.0, 0.0, 1, 2), (0.0, 0.0, -0.06, 1, 4), (0, 0, 0, 0, 3), (0.0, 0.0, 0.12, 0, 6)]
    found = examples_of(annotated(far, "pick up the carrot", 0.0)[1], ExampleOptions())
    assert [drop[:2] for drop in found.drops] == [("actions", 0)]
    zigzag: list[Segment] = [(0.01 * (-1) ** i, 0.0, 0.0, 1, 1) for i in range(40)]
    dropped = examples_of(annotated(zigzag, "push the cup", 0.0)[1], ExampleOptions()).drops
    assert "actions" in {drop[0] for drop in dropped}


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UsageError):
        ExampleOptions(kinds=("nonsense",))


def test_examples_on_disk_resume_and_load(tmp_path: Path) -> None:
    pairs = [
        annotated(segments, task)
        for segments, task in (
            (PICK, "pick up the carrot"),
            (EGGPLANT_FISH, "put the eggplant in the pan, then lift the fish"),
        )
    ]
    episodes = [dataclasses.replace(pair[0], key=f"fake/{index}") for index, pair in enumerate(pairs)]
    notes = {
        episode.key: dataclasses.replace(pair[1], episode_key=episode.key)
        for episode, pair in zip(episodes, pairs, strict=True)
    }
    counts = CurateCounts()
    for part in (episodes[:1], episodes):
        writer = ExampleWriter(tmp_path, MAIN, 112, episodes_per_part=1)
        left = [episode for episode in part if episode.key not in writer.done]
        list(curate(left, notes, writer, MAIN, counts))
    table = pq.read_table(tmp_path / "part-00000.parquet")
    assert table.column_names == [
        "images", "prompt", "completion", "kind", "episode_key", "first", "last", "prompt_version", "variant",
    ]  # fmt: skip
    loaded = load_examples(tmp_path, 112)
    assert len(loaded) == counts.examples.total() and counts.episodes == 2
    assert loaded.pixels.shape[1:] == (112, 112, 3)
    assert len(loaded.pixels) < len(loaded)
    with pytest.raises(UsageError, match="other options"):
        ExampleWriter(tmp_path, ExampleOptions(seed=1), 112)
