"""The peers' models and how they are trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedkd.settings.declare import CODE, EPOCHS, FILES, FREE, START, TRAINING, Condition, setting
from fedkd.settings.rules import (
    ANY,
    AUGMENTATION,
    INPUT_SIZE,
    NON_EMPTY,
    TRAINED,
    above,
    at_least,
    between,
    one_of,
)

if TYPE_CHECKING:
    from fedkd.settings.config import RunConfig

OPTIMIZERS = ("adam", "adamw", "sgd")


def _pretrain_epochs(c: "RunConfig", kind: str, round: int) -> int:
    return c.pretrain_epochs if kind == "start" and not c.cold else 0


@dataclass(frozen=True)
class Training:
    """The peers' models and how they are trained."""

    title: ClassVar[str] = "The peers' models and how they train"

    models: str = setting(
        "mlp,cnn-small,cnn-wide,resnet8,resnet14,resnet20",
        NON_EMPTY,
        "model names, dealt out over the peers in order; `timm:NAME` and `hf:NAME` for other libraries'",
        decides=START,
        opens=CODE,
        own="model",
    )
    checkpoints: str = setting(
        "",
        ANY,
        "checkpoint paths, dealt out like `models`; `-` or empty: none",
        decides=START,
        opens=FILES,
        own="checkpoint",
    )
    replace_head: bool = setting(
        False,
        ANY,
        "a model whose checkpoint is for other classes gets a new head, of the peer's own initialisation",
        decides=START,
        takes=Condition("checkpoints", lambda c: bool(c.checkpoints)),
        own="replace-head",
    )
    held_out: str = setting(
        "",
        ANY,
        "files of the indices of training samples that the `checkpoints` were not trained on, dealt out alike; peers "
        "choose by them and never train on them; `-` or empty: none is known",
        decides=START,
        opens=FILES,
        own="held-out",
    )
    input_size: str = setting(
        "",
        INPUT_SIZE,
        "height and width at which models see images, dealt out like `models`; `data`: as the data are; `-` or empty: "
        "as the model's own description says, if it has one",
        decides=START,
        costs=FREE,
        own="input-size",
    )
    train: str = setting(
        "all",
        TRAINED,
        "what of a model trains, dealt out like `models`: `all`, the `head`, on features computed once, or the "
        "`last:N` layers",
        decides=TRAINING,
        costs=FREE,
        own="train",
    )
    pretrain_epochs: int = setting(
        20,
        at_least(0),
        "epochs on private data before round 1",
        decides=START,
        epochs=_pretrain_epochs,
        costs=EPOCHS,
    )
    pretrain: str = setting(
        "fresh",
        one_of("fresh", "all"),
        "whose models train before round 1: `fresh`: of those peers that start from no checkpoint, or with a new head; "
        "`all`: finished models too",
        decides=TRAINING,
        takes=Condition("pretrain-epochs above 0", lambda c: c.pretrain_epochs > 0),
        absent="all",
    )
    optimizer: str = setting("adam", one_of(*OPTIMIZERS), "optimiser of every training phase", decides=TRAINING)
    learning_rate: float = setting(
        0.001, above(0), "learning rate of every training phase", decides=TRAINING, costs=FREE
    )
    learning_rate_schedule: str = setting(
        "constant",
        one_of("constant", "cosine", "step"),
        "how it goes on after the warm-up: `cosine` to 0, `step` to a tenth after half of the steps and a hundredth "
        "after three quarters",
        decides=TRAINING,
    )
    learning_rate_warm_up: float = setting(
        0.0,
        between(0, 0.9),
        "share of the steps over which the learning rate first grows linearly to its value",
        decides=TRAINING,
        costs=FREE,
    )
    learning_rate_over: str = setting(
        "phase",
        one_of("phase", "run"),
        "the steps that schedule and warm-up go over: of each training phase, or of all rounds, whoever takes part in "
        "them; pre-training is a phase of its own",
        decides=TRAINING,
        takes=Condition(
            "learning-rate-schedule cosine or step, or a learning-rate-warm-up",
            lambda c: c.rate_varies,
        ),
    )
    momentum: float = setting(
        0.9,
        between(0, 0.999),
        "momentum of `sgd`",
        decides=TRAINING,
        takes=Condition("optimizer sgd", lambda c: c.optimizer == "sgd"),
        costs=FREE,
    )
    weight_decay: float = setting(0.0, at_least(0), "weight decay", decides=TRAINING, costs=FREE)
    gradient_clip: float = setting(
        0.0,
        at_least(0),
        "the largest norm that a step's gradient may have, over all weights; 0: any",
        decides=TRAINING,
        costs=FREE,
    )
    batch_size: int = setting(32, at_least(2), "images per step", decides=TRAINING, costs="max-batch-size")
    augment: str = setting(
        "none",
        AUGMENTATION,
        "what private images go through whenever they are trained on: `crop-flip`: shifted by up to an eighth, half of "
        "them mirrored; `randaugment`: that and two random operations; or a function of images [B, C, H, W]",
        decides=TRAINING,
        opens=CODE,
    )
    label_smoothing: float = setting(
        0.0,
        between(0, 0.99),
        "share of each label that the labels' loss spreads over all classes",
        decides=TRAINING,
        costs=FREE,
    )
    logit_adjustment: float = setting(
        0.0,
        at_least(0),
        "λ of the labels' loss, the cross-entropy of z + λ·log π with π the shares of the peer's own classes; 0: off",
        decides=TRAINING,
        costs=FREE,
    )
    logit_suppression: float = setting(
        0.0,
        at_least(0),
        "weight of a penalty, beside the labels' loss, on logits of classes that are not the label; 0: off",
        decides=TRAINING,
        costs=FREE,
    )
    vacant_classes: float = setting(
        0.0,
        at_least(0),
        "weight of a loss, beside the labels' in a round, that keeps apart the classes that a peer has no sample of "
        "as its model did before; 0: off",
        decides=TRAINING,
        costs=FREE,
    )
    fast: bool = setting(
        False,
        ANY,
        "compute in bfloat16 where that is faster, with fused steps, channels last; not bit by bit the same",
        decides=TRAINING,
    )
    compiled: bool = setting(
        False,
        ANY,
        "compile models, on a GPU into CUDA graphs: minutes for each architecture in each actor",
        decides=TRAINING,
    )
