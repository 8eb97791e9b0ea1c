"""Every prompt of the paper, by name and version; the server and training use the same strings.

Inserted text goes in unescaped, exactly as given, whatever braces or quotes it holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm2vla_schema.embodiments import WIDOWX, Embodiment

PROMPT_VERSIONS: dict[str, str] = {
    "subtasks": "d4",
    "motion_plan": "d4",
    "actions": "d4",
    "verify": "d5",
    "verify_last": "d5-last",
    "vqa": "plain",
    "completion": "b2-completion",
    "direction": "b2-direction",
    "annotation": "b1",
    "human": "b2",
}
"""Stage -> version of its prompt. "d4", "d5", "b1" and "b2" are printed in the paper; the others are ours."""

SUBTASKS_D4 = (
    "Describe the sequence of remaining high-level steps required to complete the overall task '{task}', starting "
    "from the current state. Give your output as a list. Be specific and do not skip steps. Here is an example for "
    "'put the pot in the sink': ['Move Down to Pot', 'Grasp Pot', 'Lift Pot High', 'Move Pot Left to the Sink', "
    "'Lower Pot to Sink', 'Release']. Start with 'Move to'"
)

MOTION_PLAN_D4 = (
    "Given the image, reason about what high-level actions the robot arm should take to complete the task "
    '"{subtask}". +dx is forward, -dx is backward, +dy is left, -dy is right, +dz is up, -dz is down, 1 is gripper '
    "open, 0 is gripper closed. Provide concise, accurate spatial reasoning."
)

_ACTIONS_HEAD_D4 = (
    "You are programming a 4-DoF robot arm (x,y,z,gripper). +dx is forward, -dx is backward, +dy is left, -dy is "
    "right, +dz is up, -dz is down, 1 is gripper open, 0 is gripper closed. Based on the sub-task '{subtask}'"
)
_ACTIONS_REASONING_D4 = " and the reasoning '{motion_plan}'"
_ACTIONS_TAIL_D4 = (
    ", output the sequence of low-level [dx, dy, dz, gripper] actions needed as a python list of lists. Be concise in "
    "direction of movement. Example format: [[dx1,dy1,dz1, grip1], [dx2,dy2,dz2, grip2]]. PROVIDE ONLY THE PYTHON "
    "LIST."
)
ACTIONS_D4 = _ACTIONS_HEAD_D4 + _ACTIONS_REASONING_D4 + _ACTIONS_TAIL_D4
ACTIONS_WITHOUT_PLAN_D4 = _ACTIONS_HEAD_D4 + _ACTIONS_TAIL_D4

_VERIFY_RULES_D5 = (
    "\n\nCRITICAL RULE: Judge the Precondition.\n\n"
    "A 'move to' action is ONLY successful if the final position is perfectly aligned for the subsequent action, "
    "i.e., executing a grasp as the next step will result in a successful grasp. A 'close enough' position is a "
    "FAILURE if it jeopardizes the next step.\n\n"
    "For a 'grasp' subtask to succeed, the gripper MUST be centered directly above the object's grasp point in the "
    "preceding 'move' step. Any significant offset or misalignment in the 'after' image is a failure.\n\n"
    "Provide your analysis in the specified JSON format, following the turn-based examples."
)
_VERIFY_HEAD_D5 = (
    "You are a precision-oriented robot inspector. Your primary job is to evaluate the two images (before, after) if "
    "the 'Current Subtask' ({subtask}) was executed with enough precision to guarantee the success of "
)
VERIFY_D5 = _VERIFY_HEAD_D5 + "the 'Next Subtask' ({next_subtask})." + _VERIFY_RULES_D5
VERIFY_LAST_D5 = _VERIFY_HEAD_D5 + "the overall task. It is the last subtask: none follows." + _VERIFY_RULES_D5

_ANNOTATION_INPUTS_B1 = (
    "Attached are images of a robot performing a task{labels}, and the real actions in a text file called "
    "trajectory_log_content. "
)
_ANNOTATION_AXES_B1 = (
    "You are programming a {degrees}-DoF robot arm ({axes}). {signs} The gripper takes a binary value of 1 for open "
    "and 0 for closed.\n\n"
)
_ANNOTATION_TASK_B1 = (
    "Your task is to analyze the language instruction found in the trajectory log. Crucially, first think step-by-step "
    "and explain your reasoning for each action phase necessary to complete the instruction given all the images and "
    "their ordering during the trajectory. Be short and concise. Output your reasoning as a structured JSON file.\n\n"
)
_ANNOTATION_COPIES_B1 = (
    "Then, after you've explained your reasoning, give the actions with respect to ({row}) that the "
    "robot must execute to achieve this goal given the orientation described previously, associating each action "
    "or group of actions with the natural language decomposition you decided on. Store these actions in JSON "
    "format as a list of dictionaries, where each dictionary has 'step_description' (string) and 'actions' (list "
    "of lists representing [{row}]). Make sure your actions match what is provided in the attached "
    ".txt file. For example:\n\n"
)
_ANNOTATION_RANGES_B1 = (
    "Then, after you've explained your reasoning, divide the trajectory into consecutive steps, associating each group "
    "of rows of the log with the natural language decomposition you decided on. Do not copy the actions. Store the "
    "steps in JSON format as a list of dictionaries, where each dictionary has 'step_description' (string, a short "
    "name such as 'Grasp Lid Handle'; the first one starts with 'Move to'), 'reasoning' (string), 'main_movements' "
    "(string: the directions in which the gripper mainly moves, in the words {words}, and what the gripper does; no "
    "digits), and 'first' and 'last' (integers: the numbers of the first and the last row of the step, both included). "
    "The first step begins with the first row of the log, each further step with "
    "the row after the last one of the step before, and the last step ends with the last row of the log. The row at "
    "which the gripper closes belongs to the step that grasps, the row at which it opens to the step that releases."
    "\n\n"
)
_ANNOTATION_LOG_B1 = "Here is the trajectory log content: {trajectory_log}"

ANNOTATION_B1 = (
    _ANNOTATION_INPUTS_B1.replace("{labels}", "")
    + _ANNOTATION_AXES_B1
    + _ANNOTATION_TASK_B1
    + _ANNOTATION_COPIES_B1
    + _ANNOTATION_LOG_B1
)
ANNOTATION_RANGES = (
    _ANNOTATION_INPUTS_B1.replace("{labels}", ", each after its observation number")
    + _ANNOTATION_AXES_B1
    + _ANNOTATION_TASK_B1
    + _ANNOTATION_RANGES_B1
    + _ANNOTATION_LOG_B1
)
ANNOTATION_PROMPTS: dict[str, str] = {"b1-paper": ANNOTATION_B1, "b1-ranges": ANNOTATION_RANGES}
"""Version -> annotation prompt: copied actions as printed, or inclusive row ranges (ours). Annotations name theirs; no
model is served with them, so they are not among `PROMPT_VERSIONS`.
"""

ANNOTATION_REPAIR = (
    "Your answer cannot be used, for these reasons:\n{findings}\n\n"
    "Compare it with the trajectory log again and give the whole answer anew, corrected, in the same JSON format."
)

HUMAN_B2 = (
    "You are programming a 4-DoF robot arm. Based on the image ({image_name}) and subtask '{subtask}', output the "
    "sequence of low-level [x, y, z, gripper] actions needed to accomplish the task."
)

COMPLETION_B2 = (
    "The first image was taken before and the second image after the robot worked on the subtask '{subtask}'. Was the "
    "subtask completed successfully? Answer yes or no."
)
COMPLETION_ANSWERS: dict[bool, str] = {True: "yes", False: "no"}

DIRECTION_B2 = (
    "Given the image, in which direction should the robot arm move to complete the subtask '{subtask}'? Answer with "
    "three words: forward, backward or none; left, right or none; up, down or none."
)

_PLACE = re.compile(r"\{([a-z_]+)\}")


def _fill(template: str, **values: str) -> str:
    """Put values into a template in one pass, so that a value that itself looks like a place stays as it is."""
    return _PLACE.sub(lambda match: values[match[1]], template)


def subtasks_prompt(task: str) -> str:
    """The subtask prediction prompt of appendix D.4."""
    return _fill(SUBTASKS_D4, task=task)


def motion_plan_prompt(subtask: str) -> str:
    """The motion-planning prompt of appendix D.4."""
    return _fill(MOTION_PLAN_D4, subtask=subtask)


def actions_prompt(subtask: str, motion_plan: str | None) -> str:
    """The action generation prompt of appendix D.4.

    `motion_plan=None`, for models trained without that stage (-NR), leaves out the clause about the reasoning.
    """
    if motion_plan is None:
        return _fill(ACTIONS_WITHOUT_PLAN_D4, subtask=subtask)
    return _fill(ACTIONS_D4, subtask=subtask, motion_plan=motion_plan)


def verify_prompt(subtask: str, next_subtask: str | None) -> str:
    """The verifier's instructions of appendix D.5; the images before and after are attached in this order.

    `next_subtask=None`, for the last subtask, uses our wording `d5-last`: the paper prints none.
    """
    if next_subtask is None:
        return _fill(VERIFY_LAST_D5, subtask=subtask)
    return _fill(VERIFY_D5, subtask=subtask, next_subtask=next_subtask)


def verify_prompt_version(next_subtask: str | None) -> str:
    """The version of the prompt that `verify_prompt` gives for the same argument."""
    return PROMPT_VERSIONS["verify_last" if next_subtask is None else "verify"]


def annotation_prompt(trajectory_log: str, version: str = "b1-paper", embodiment: Embodiment = WIDOWX) -> str:
    """An annotation prompt of `ANNOTATION_PROMPTS`; the log's text (instruction and actions) comes last.

    `b1-paper` for the default embodiment is appendix B.1 as printed.
    """
    return _fill(ANNOTATION_PROMPTS[version], trajectory_log=trajectory_log, **embodiment.places())


def annotation_repair_prompt(findings: Sequence[str]) -> str:
    """The second and last request for an annotation that was not accepted (ours); `findings` say why, one a line."""
    return _fill(ANNOTATION_REPAIR, findings="\n".join(f"- {finding}" for finding in findings))


def human_prompt(subtask: str, image_name: str) -> str:
    """The human prompt printed in appendix B.2; kept for the record, training uses D.4's wording."""
    return _fill(HUMAN_B2, subtask=subtask, image_name=image_name)


def completion_prompt(subtask: str) -> str:
    """Ask whether a subtask was completed between two images (B.2's auxiliary examples; the wording is ours).

    The answer is one of `COMPLETION_ANSWERS`.
    """
    return _fill(COMPLETION_B2, subtask=subtask)


def direction_prompt(subtask: str) -> str:
    """Ask for the direction of movement along each axis (B.2's auxiliary examples; the wording is ours)."""
    return _fill(DIRECTION_B2, subtask=subtask)
