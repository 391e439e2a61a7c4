from pipeline.callbacks.ema import EMA
from pipeline.callbacks.evaluation import Evaluation
from pipeline.callbacks.last import Last, Stopped
from pipeline.callbacks.precision import Precision
from pipeline.callbacks.progress import Progress
from pipeline.callbacks.sheets import SampleSheet

__all__ = ["EMA", "Evaluation", "Last", "Precision", "Progress", "SampleSheet", "Stopped"]
