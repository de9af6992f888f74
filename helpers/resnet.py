"""ResNet50 written out, and seeded stand-in weights for a machine that cannot get the real ones.

The network is torchvision's `resnet50`: same names, same shapes, same arithmetic, so state dicts of
either fit the other (tests/test_model.py checks that). It is repeated here because `import
torchvision` costs a worker process as much as `import torch` does, and every worker pays that.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride sits on the 3x3 (version 1.5)."""

    def __init__(self, width_in: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or width_in != 4 * width:
            shortcut = nn.Conv2d(width_in, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut
        return self.relu(x)


class ResNet50(nn.Module):
    """(N, 3, 224, 224) normalized images -> (N, 1000) logits."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, blocks=3, stride=1)
        self.layer2 = _stage(256, 128, blocks=4, stride=2)
        self.layer3 = _stage(512, 256, blocks=6, stride=2)
        self.layer4 = _stage(1024, 512, blocks=3, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 224, 224) -> (N, 2048), what the last layer sees."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)


def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(4 * width, width) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(width_in, width, stride), *rest)


def fold_batch_norm(network: ResNet50) -> ResNet50:
    """Let each convolution do the work of the batch norm behind it, in place and for inference:
    outside of training that one only scales and shifts each channel, by numbers that are known.
    The answers are the same but for rounding, and each of 53 layers reads and writes its data once
    less. Fold in float32, and convert afterwards.
    """
    for part in network.modules():
        if isinstance(part, ResNet50 | Bottleneck):
            for conv, norm in ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"):
                if hasattr(part, norm):
                    fused = fuse_conv_bn_eval(getattr(part, conv), getattr(part, norm))
                    setattr(part, conv, fused)
                    setattr(part, norm, nn.Identity())
        if isinstance(part, Bottleneck) and part.downsample is not None:
            part.downsample = fuse_conv_bn_eval(*part.downsample)
    return network


def empty() -> ResNet50:
    """The network without numbers: no memory, no random initialization. Load a state dict with
    `assign=True` into it."""
    with torch.device("meta"):
        return ResNet50()


# ---- the stand-in -------------------------------------------------------------------------------

# Any change below needs a new number in model._STAND_IN: cached files outlive the code.
_SEED = 20
_IMAGES = 24
_BRANCH = 0.2  # weight of a block's branch against its shortcut: tames the chaos of random layers
_LOGIT_STD = 2.5  # about what the trained network has


def stand_in() -> dict[str, torch.Tensor]:
    """A state dict (float32) that tells images apart but has learned nothing. About 10 seconds.

    A plain random ResNet50 gives every image the same class, so a comparison with it proves
    nothing. Here the batch-norm statistics and the last layer are fitted to seeded synthetic
    images: logits then vary from image to image about as much as from class to class, and swapped
    color channels, a missing /255 or a squashed aspect ratio change the answer.

    The same numbers come out on every machine: random numbers are NumPy's frozen uniform stream,
    the fit runs in float64, and what it yields is rounded to 12 bits.
    """
    random = np.random.RandomState(_SEED)
    pixels = np.stack([_image(random) for _ in range(_IMAGES)]).transpose(0, 3, 1, 2)
    model = empty().to_empty(device="cpu").double().train()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            bound = (6 / module.weight[0].numel()) ** 0.5  # keeps the variance through a ReLU
            _fill(module.weight, random.uniform(-bound, bound, module.weight.shape))
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the one batch below, not an average
            module.reset_parameters()
            nn.init.constant_(module.weight, _BRANCH if name.endswith("bn3") else 1.0)
    with torch.inference_mode():
        features = model.features(torch.from_numpy((pixels / 255 - 0.45) / 0.225)).numpy()

    # Center and scale each feature, then project at random; classes differ in strength, so that
    # the best one usually wins by a margin that bfloat16 does not overturn.
    mean, std = _round(features.mean(0)), _round(features.std(0))
    weight = random.uniform(-1, 1, (1000, 2048)) / (std + 0.1 * _round(std.mean()))
    weight *= random.uniform(0.6, 1.4, (1000, 1))
    weight *= _LOGIT_STD / _round(((features - mean) @ weight.T).std())
    _fill(model.fc.weight, weight)
    _fill(model.fc.bias, _round(-weight @ mean))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            _fill(buffer, _round(buffer.numpy()))
    return {name: tensor.detach() for name, tensor in model.float().state_dict().items()}


def _image(random: np.random.RandomState) -> np.ndarray:
    """Discs and boxes that hide each other, many small and few large, plus grain: the statistics of
    edges and colors are close to those of photographs. uint8 (224, 224, 3)."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (224, 224))
    draw = ImageDraw.Draw(image)
    tint, spread, chroma = random.uniform(40, 215, 3), random.uniform(20, 150), random.uniform(0, 1)
    for radius in sorted(3 / random.uniform(0.025, 1, 600), reverse=True):
        color = tint + spread * (random.uniform(-1, 1) + chroma * random.uniform(-1, 1, 3))
        x, y = random.uniform(0, 224, 2)
        height = radius * random.uniform(0.3, 1)
        shape = draw.ellipse if random.uniform() < 0.5 else draw.rectangle
        box = [x - radius, y - height, x + radius, y + height]
        shape(box, fill=tuple(int(value) for value in color.clip(0, 255)))
    grain = random.uniform(-1, 1, (224, 224, 1)) * random.uniform(0, 40)
    return (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)


def _fill(tensor: torch.Tensor, values: np.ndarray) -> None:
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(np.asarray(values)))


def _round(values: np.ndarray) -> np.ndarray:
    """Keep 12 bits: enough to drop what differs between two machines' float64 sums."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 4096) / 4096, exponent)
