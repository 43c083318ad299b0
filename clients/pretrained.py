"""Pre-trained models that this process keeps: trials that differ only in their exchange start from the same ones."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict

from torch import Tensor, nn

from clients.configuration import PeerConfig
from fedkd.settings.config import RunConfig

_EXCHANGE = {
    "rounds", "strategy", "topology", "topology_degree", "topology_probability", "matching", "fanout", "gossip_style",
    "mode", "updates", "max_seconds", "participation", "consensus", "fedavg_start", "fedavg_model", "divergence",
    "temperature", "kd_weight", "t2_scaling", "match_gradients", "combine", "average", "reduction", "sharpen", "robust",
    "trim", "regime", "schedule", "distill_epochs", "local_epochs", "cakd_alpha", "cakd_beta", "bdkd_delta",
    "bdkd_rule", "method", "flow_auxiliary", "flow_decay", "flow_weight", "flow_initial", "proxy_per_round", "codec",
    "controls", "eval_every", "out_dir", "run_name", "trials", "resume", "privacy_epsilon", "privacy_delta",
    "privacy_clip", "profile", "keep_models",
}  # fmt: skip
"""Settings without a say in how a peer starts. One that is not named here costs a hit, never a wrong start.

Of the regimes one has: a tuned peer holds a part of its data out (:mod:`clients.held_out`).
"""

_MOST_BYTES = 256 * 2**20

State = dict[str, Tensor]
_kept: "OrderedDict[str, tuple[State, int]]" = OrderedDict()  # the process's cache; what it holds can be made again


def pretrain(
    model: nn.Module,
    config: RunConfig,
    peer_config: PeerConfig,
    versions: tuple[str, ...],
    train: Callable[[], int],
    *,
    common: bool = False,
) -> int:
    """Bring a model to a peer's start: from this process's memory if it trained the same before, else by training.

    Args:
        model: as it comes, on its device.
        config: the run's settings as they hold at the peer.
        peer_config: the peer.
        versions: of its files, as :func:`clients.data.file_versions` returns them.
        train: trains the model, and returns the number of private samples that it was trained on.
        common: it is the architecture that is averaged, not the peer's own.

    Returns:
        What ``train`` returned, now or then.
    """
    said = {name: value for name, value in asdict(config).items() if name not in _EXCHANGE}
    tuned, own = config.regime == "tuned", (peer_config.model, peer_config.checkpoint)
    which = ("common", config.fedavg_model) if common else own
    data = (peer_config.dataset, peer_config.held_out)
    key = repr((sorted(said.items()), tuned, peer_config.index, peer_config.of, which, data, versions))
    if key in _kept:
        state, samples = _kept[key]
        model.load_state_dict(state)
        _kept.move_to_end(key)
        return samples
    samples = train()
    _kept[key] = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}, samples
    while len(_kept) > 1 and sum(_bytes(state) for state, _ in _kept.values()) > _MOST_BYTES:
        _kept.popitem(last=False)
    return samples


def _bytes(state: State) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())
