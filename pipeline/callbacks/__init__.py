from pipeline.callbacks.ema import *
from pipeline.callbacks.evaluation import *
from pipeline.callbacks.last import *
from pipeline.callbacks.precision import *
from pipeline.callbacks.progress import *
from pipeline.callbacks.recompute import *
from pipeline.callbacks.sheets import *
from pipeline.callbacks.watch import *
