"""The Flower ClientApp: one site's model, data and state."""

from pathlib import Path

from fedkd.workdir import enter_bundle

enter_bundle(Path(__file__).resolve().parent.parent)
