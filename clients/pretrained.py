"""Pre-trained models that this process keeps: trials that differ only in their exchange start from the same ones."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from clients.configuration import PeerConfig
from fedkd.settings.config import RunConfig
from fedkd.settings.declare import BOOKKEEPING, EXCHANGE, declared

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
    decided = {name for name, about in declared(RunConfig).items() if about.decides not in (EXCHANGE, BOOKKEEPING)}
    said = {name: value for name, value in config.to_mapping().items() if name in decided}
    tuned = config.regime == "tuned"  # of the exchange, but such a peer holds a part of its data out before its start
    own = peer_config.model, peer_config.checkpoint
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
