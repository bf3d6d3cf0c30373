"""Networks that are not classifiers, as people have them, with random weights and small images: a file of factories."""

SOURCE = '''
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

PREPROCESSING = {"height": 64, "width": 64, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def settled(net):
    """With the BatchNorm statistics of noise, as training leaves them: untrained ones let activations vanish."""
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            net.train()(torch.randn(4, 3, 64, 64))
    return net.eval()


def segmentation(name, **options):
    return settled(torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **options))


def fcn():
    return segmentation("fcn_resnet50", aux_loss=True)


def deeplab():
    return segmentation("deeplabv3_mobilenet_v3_large", aux_loss=True)


def lraspp():
    return segmentation("lraspp_mobilenet_v3_large")


def features(name):
    import timm

    return settled(timm.create_model(name, features_only=True))


def resnet_features():
    return features("resnet18")


def regnet_features():
    return features("regnetx_002")


def mobilenet_features():
    return features("mobilenetv3_small_050")


def convnext_features():
    return features("convnext_atto")


def detector_backbone():
    return settled(torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.up = nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 8, 2, 2)
        self.joined, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        whole = torch.relu(self.stem(x))
        half = torch.relu(self.norm(self.down(F.max_pool2d(whole, 2))))
        return self.head(torch.relu(self.joined(torch.cat([self.up(half), whole], 1))))


def unet():
    return settled(UNet())
'''

KINDS = {
    "unet": ["output:logits"],
    "lraspp": ["out:logits"],
    "fcn": ["out:logits", "aux:logits"],
    "deeplab": ["out:logits", "aux:logits"],
    "resnet_features": [f"output{i}:values" for i in range(5)],
    "regnet_features": [f"output{i}:values" for i in range(5)],
    "mobilenet_features": [f"output{i}:values" for i in range(5)],
    "convnext_features": [f"output{i}:values" for i in range(4)],
    "detector_backbone": [f"{i}:values" for i in range(6)],
}
"""By factory: the outputs and what they hold."""
