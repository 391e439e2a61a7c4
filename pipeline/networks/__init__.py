from pipeline.networks.base import *
from pipeline.networks.borrowed import *
from pipeline.networks.dit import *
from pipeline.networks.mlp import *
from pipeline.networks.unet import *
