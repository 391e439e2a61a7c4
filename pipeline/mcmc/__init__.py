from pipeline.mcmc.kernels import *
from pipeline.mcmc.nuts import *
from pipeline.mcmc.posterior import *
from pipeline.mcmc.run import *
from pipeline.mcmc.targets import *
