from pipeline.callbacks.ema import EMA
from pipeline.callbacks.last import Last, Stopped
from pipeline.callbacks.precision import Precision
from pipeline.callbacks.progress import Progress
from pipeline.callbacks.sheets import SampleSheet

__all__ = ["EMA", "Last", "Precision", "Progress", "SampleSheet", "Stopped"]
