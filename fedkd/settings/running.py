"""What is run, where, and what is left of it."""

from dataclasses import dataclass
from typing import ClassVar

from fedkd.settings.declare import (
    BOOKKEEPING,
    CONTROLS,
    DATA,
    EXCHANGE,
    FREE,
    MACHINE,
    RELAY_PATH,
    SIMULATED_CODE,
    setting,
)
from fedkd.settings.rules import ANY, NAME, NON_EMPTY, at_least, one_of, some_of


@dataclass(frozen=True)
class Running:
    """What is run, where, and what is left of it."""

    title: ClassVar[str] = "The run"

    peers: int = setting(
        0,
        at_least(0),
        "peers that take part; 0, in a simulation: one for each Flower node; more than that share the nodes",
        decides=DATA,
        costs="max-peers",
    )
    trials: str = setting(
        "",
        ANY,
        'file of trials to run one after another on the same peers, `{"name": ..., "settings": {...}}` a line',
        decides=BOOKKEEPING,
        opens=RELAY_PATH,
    )
    eval_every: int = setting(
        1,
        at_least(1),
        "evaluate in every n-th round (and always in the last)",
        decides=BOOKKEEPING,
        controls=CONTROLS,
        costs=FREE,
    )
    evaluate_on: str = setting(
        "test",
        one_of("test", "validation"),
        "the test set; or a `validation-share` of the training set that no peer then holds, to choose settings by",
        decides=DATA,
    )
    controls: str = setting(
        "isolated,pooled,channel", some_of(*CONTROLS), "control runs added to the result", decides=BOOKKEEPING
    )
    pooled_model: str = setting(
        "cnn-wide",
        NON_EMPTY,
        "model of the pooled control",
        decides=EXCHANGE,
        opens=SIMULATED_CODE,
        controls=("pooled",),
    )
    device: str = setting(
        "auto",
        NON_EMPTY,
        "`auto` (the GPU that Ray gave the actor, else the CPU), `cpu`, `cuda`, `cuda:N`",
        decides=MACHINE,
        own="device",
    )
    threads: int = setting(
        1,
        at_least(1),
        "torch CPU threads of a peer; results depend on it, not on the number of actors",
        decides=MACHINE,
        costs="max-threads",
    )
    profile: bool = setting(
        False, ANY, "measure where each peer's time goes, and leave a table and a figure of it", decides=BOOKKEEPING
    )
    seed: int = setting(0, at_least(0), "seed of every random stream", decides=MACHINE, costs=FREE)
    out_dir: str = setting(
        "",
        ANY,
        "folder for the results; empty: `runs/<time>-<run-name>` where the run was started",
        decides=BOOKKEEPING,
        opens=RELAY_PATH,
    )
    keep_models: bool = setting(
        True,
        ANY,
        "leave each peer's final model in `models/` of the results; real peers keep theirs in any case",
        decides=BOOKKEEPING,
    )
    run_name: str = setting("fedkd", NAME, "name of the run", decides=BOOKKEEPING)
