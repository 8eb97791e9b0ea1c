"""The Policy Protocol and its implementations, under one import path."""

from vlm2vla_client.policies.base import (
    ALL_STAGES,
    Answered,
    Asked,
    CycleEvent,
    PlanArrived,
    Policy,
    PolicyInfo,
    RowArrived,
    RowDropped,
    Scenario,
    SubtasksAnswer,
)
from vlm2vla_client.policies.expert import ExpertPolicy
from vlm2vla_client.policies.random import RandomPolicy
from vlm2vla_client.policies.server import ServerPolicy
from vlm2vla_client.policies.swapped import SwappedPolicy

__all__ = [
    "ALL_STAGES",
    "Answered",
    "Asked",
    "CycleEvent",
    "ExpertPolicy",
    "PlanArrived",
    "Policy",
    "PolicyInfo",
    "RandomPolicy",
    "RowArrived",
    "RowDropped",
    "Scenario",
    "ServerPolicy",
    "SubtasksAnswer",
    "SwappedPolicy",
]
