import pytest
from training_fakes import EGGPLANT_FISH, PICK, PLACE, RETRY, Segment, episode_of

from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.annotation.instruction import Goal, parse_instruction
from vlm2vla_training.annotation.rules import RulesAnnotator
from vlm2vla_training.commands import meanings
from vlm2vla_training.errors import UsageError


def titles(segments: list[Segment], instruction: str, noise_m: float = 0.0, seed: int = 0) -> list[str]:
    annotated = RulesAnnotator().annotate(episode_of(segments, instruction, noise_m=noise_m, seed=seed))
    assert annotated.audit["covered"] and annotated.audit["actions_match"] and annotated.audit["begins_with_move"]
    return [step.step_description for step in annotated.steps]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise_m", [0.0, 0.001, 0.002])
def test_pick(noise_m: float, seed: int) -> None:
    assert titles(PICK, "pick up the carrot", noise_m, seed) == ["Move to Carrot", "Grasp Carrot", "Lift Carrot"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("noise_m", [0.0, 0.001, 0.002])
def test_place(noise_m: float, seed: int) -> None:
    assert titles(PLACE, "put the carrot on the yellow plate", noise_m, seed) == [
        "Move to Carrot",
        "Grasp Carrot",
        "Lift Carrot",
        "Move Carrot to Yellow Plate",
        "Lower Carrot to Yellow Plate",
        "Release Carrot",
    ]


def test_compound() -> None:
    assert titles(EGGPLANT_FISH, "put the eggplant in the pan, then lift the fish") == [
        "Move to Eggplant",
        "Grasp Eggplant",
        "Lift Eggplant",
        "Move Eggplant to Pan",
        "Lower Eggplant to Pan",
        "Release Eggplant",
        "Move to Fish",
        "Grasp Fish",
        "Lift Fish",
    ]


def test_a_failed_grasp_is_a_second_grasp_step() -> None:
    episode = episode_of(RETRY, "pick up the carrot")
    annotated = RulesAnnotator().annotate(episode)
    assert [step.step_description for step in annotated.steps] == [
        "Move to Carrot",
        "Grasp Carrot",
        "Grasp Carrot",
        "Lift Carrot",
    ]
    assert annotated.steps[2].main_movements == (
        "Open the gripper, then move up, then move slightly left and down, then close the gripper."
    )
    assert annotated.audit["notes"]


def test_boundaries_of_pick() -> None:
    steps = RulesAnnotator().annotate(episode_of(PICK, "pick up the carrot")).steps
    assert (steps[0].first, steps[-1].last) == (0, sum(segment[4] for segment in PICK) - 1)
    assert abs(steps[0].last - 6) <= 1
    assert (steps[1].last, steps[2].first) == (13, 14)
    assert steps[0].main_movements == "Move far forward, slightly left and slightly down, gripper stays open."
    assert steps[1].main_movements.endswith("then close the gripper.")
    assert steps[2].main_movements == "Move far up, gripper stays closed."


def test_no_gripper_event_is_one_approach() -> None:
    assert titles([(0.1, 0.0, 0.0, 1, 5)], "push the blue cup") == ["Move to Blue Cup"]


def test_an_own_phrase_means_what_it_was_said_to_mean() -> None:
    rules = RulesAnnotator({"recoge la zanahoria": "pick up the carrot"})
    told = rules.annotate(episode_of(PICK, "Recoge  la zanahoria"))
    assert [step.step_description for step in told.steps] == ["Move to Carrot", "Grasp Carrot", "Lift Carrot"]
    assert told.instruction == "Recoge  la zanahoria", "the episode keeps its own words"
    assert rules.annotate(episode_of(PICK, "pick up the fish")).steps[0].step_description == "Move to Fish"


def test_things_named_as_in_a_sentence() -> None:
    plain, titled = RulesAnnotator(plain_names=True), RulesAnnotator()
    episode = episode_of(PLACE, "put the carrot on the yellow plate")
    told = [step.step_description for step in plain.annotate(episode).steps]
    assert told[0] == "Move to the carrot" and told[3] == "Move the carrot to the yellow plate"
    assert [step.reasoning for step in plain.annotate(episode).steps] == [
        step.reasoning for step in titled.annotate(episode).steps
    ], "the reasons are sentences in both"
    assert plain.name != titled.name, "an annotation tells how it names things"


@pytest.mark.parametrize("given", [["feierabend"], ["=pick up"], ["a=b", "a=c"]])
def test_meanings_that_are_none_are_refused(given: list[str]) -> None:
    assert meanings(["a=b", "c = d"]) == {"a": "b", "c": "d"}
    with pytest.raises(UsageError, match="--means"):
        meanings(given)


@pytest.mark.parametrize(
    ("text", "goals"),
    [
        ("pick up the carrot", [Goal("pick up", "Carrot", None)]),
        ("Put the carrot on the yellow plate.", [Goal("put", "Carrot", "Yellow Plate")]),
        (
            "put the eggplant in the pan, then lift the fish",
            [Goal("put", "Eggplant", "Pan"), Goal("lift", "Fish", None)],
        ),
        ("pick up the carrot and put it on the plate", [Goal("put", "Carrot", "Plate")]),
        ("move the pot to the sink", [Goal("move", "Pot", "Sink")]),
        ("take the spoon out of the drawer", [Goal("take", "Spoon", None)]),
        ("open the silver pot", [Goal("open", "Silver Pot", None)]),
        ("put salt and pepper into the pan", [Goal("put", "Salt and Pepper", "Pan")]),
        ("flip pot upright which is in sink", [Goal("flip", "Pot", None)]),
        ("turn lever vertical to front", [Goal("turn", "Lever", None)]),
        ("", [Goal("handle", "Object", None)]),
    ],
)
def test_instructions(text: str, goals: list[Goal]) -> None:
    assert parse_instruction(text) == goals


def test_json_round_trip() -> None:
    annotated = RulesAnnotator().annotate(episode_of(PLACE, "put the carrot on the yellow plate"))
    assert AnnotatedEpisode.from_json(annotated.to_json()) == annotated
