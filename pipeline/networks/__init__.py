from pipeline.networks.mlp import MLP
from pipeline.networks.unet import UNet

__all__ = ["MLP", "UNet"]
