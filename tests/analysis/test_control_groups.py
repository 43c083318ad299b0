"""Which trials share a run of a control."""

from experiments.analysis.settings import control_group
from fedkd.settings.config import RunConfig


def test_epochs_count_for_the_pooled_control_where_peers_do_not_use_them():
    shared = {**RunConfig().to_mapping(), "peers": 2, "controls": ""}
    carrier = {**shared, "controls": "isolated,pooled"}

    for name in ("isolated", "pooled"):
        assert control_group(shared, name) == control_group(carrier, name)
        assert control_group({**shared, "divergence": "js"}, name) == control_group(carrier, name)
    assert control_group({**shared, "local-epochs": 5}, "pooled") != control_group(carrier, "pooled")
    assert control_group({**shared, "local-epochs": 5}, "isolated") == control_group(carrier, "isolated")
