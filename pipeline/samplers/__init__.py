from pipeline.samplers.adaptive import *
from pipeline.samplers.base import *
from pipeline.samplers.diffusion import *
from pipeline.samplers.langevin import *
from pipeline.samplers.likelihood import *
