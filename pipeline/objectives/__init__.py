from pipeline.objectives.base import *
from pipeline.objectives.contrastive import *
from pipeline.objectives.denoising import *
from pipeline.objectives.divergence import *
from pipeline.objectives.score_matching import *
from pipeline.objectives.weights import *
