"""Use a peer's improved model on an image: plain torch, or onnxruntime, and no fedkd.

fedkd export runs/20260101-120000-fedkd --peer peer-0 --format torchscript
python use_model.py peer-0.pt image.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def read_image(path: Path, shape: list[int], resized: str = "bilinear") -> torch.Tensor:
    """Read an image as the model takes it: ``[1, C, H, W]`` float32 in [0, 1]; it scales its inputs itself."""
    channels, height, width = shape
    how = Image.Resampling[resized.partition("-")[0].upper()]
    with Image.open(path) as image:
        fitting = image.convert("L" if channels == 1 else "RGB").resize((width, height), how)
    pixels = np.asarray(fitting, dtype=np.float32)
    return torch.from_numpy(pixels / 255).reshape(height, width, channels).permute(2, 0, 1)[None].contiguous()


def logits_of(model: Path, inputs: torch.Tensor) -> torch.Tensor:
    """Return logits ``[B, C]`` for inputs ``[B, ...]``, from a file of any format that has the scaling inside."""
    with torch.no_grad():
        if model.suffix == ".pt":
            return torch.jit.load(str(model))(inputs)
        if model.suffix == ".pt2":
            return torch.export.load(str(model)).module()(inputs)
    import onnxruntime

    (found,) = onnxruntime.InferenceSession(str(model)).run(None, {"inputs": inputs.numpy()})
    return torch.from_numpy(found)


def main(model: Path, image: Path) -> str:
    """Return the class of an image, and how sure the model is."""
    about = json.loads(model.with_name(f"{model.name}.json").read_text(encoding="utf-8"))
    inputs = read_image(image, about["input_shape"], about["resized"] or "bilinear")
    probabilities = logits_of(model, inputs).softmax(dim=-1)[0]
    best = int(probabilities.argmax())
    return f"{about['classes'][best]} ({probabilities[best]:.1%})"


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
