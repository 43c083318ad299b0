"""Losses between predictions: divergences by name, of one teacher and of many, and of whole layers."""

from fedkd.losses.balanced import OnlineLosses, balanced, online
from fedkd.losses.decoupled import Decoupled, cakd, cakd_features, decouple, dkd, warm_up
from fedkd.losses.divergences import (
    Divergence,
    TeacherTerms,
    ce,
    get,
    jeffreys,
    js,
    kl,
    msed,
    names,
    register,
    reverse_kl,
    sed,
    td,
)
from fedkd.losses.information_flow import (
    FlowDivergence,
    FlowLoss,
    features,
    flow_divergence,
    project,
    transfer,
    transfer_via_auxiliary,
)
from fedkd.losses.robust import agreement_weights
from fedkd.losses.teachers import Objective, objective
from fedkd.losses.weighing import Evidence, predicted_prior

__all__ = [
    "Decoupled",
    "Divergence",
    "Evidence",
    "FlowDivergence",
    "FlowLoss",
    "Objective",
    "OnlineLosses",
    "TeacherTerms",
    "agreement_weights",
    "balanced",
    "cakd",
    "cakd_features",
    "ce",
    "decouple",
    "dkd",
    "features",
    "flow_divergence",
    "get",
    "jeffreys",
    "js",
    "kl",
    "msed",
    "names",
    "objective",
    "online",
    "predicted_prior",
    "project",
    "register",
    "reverse_kl",
    "sed",
    "td",
    "transfer",
    "transfer_via_auxiliary",
    "warm_up",
]
